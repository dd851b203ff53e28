"""A token for up to 16 rows on a GPU: a pass of few kernels, captured as a CUDA graph.

    a layer   norm, q k v in one product, rope, keys and values stored, attention, o_proj,
              norm, gate and up in one product, SwiGLU, down_proj: each product two launches, with
              every LoRA inside (lorax/kernels/narrow.py)

What a graph reads stays in its place: the rows' tokens, slots and lengths, written before each
replay; cosine and sine of all positions; the cache, of which it looks at the first places, in steps
of BUCKET. So there is a graph for each number of rows and each BUCKET of lengths, and a token costs
the host a copy and one call.

`decoder_of` gives None where a layer is not exactly known, and rows.py computes as it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.as_known import is_as_known
from lorax.adapters.lora import LoRALinear
from lorax.backend import uses_triton
from lorax.inference.rows import RowsCache
from lorax.kernels.capture import Capture, CudaCapture
from lorax.kernels.weight import PackedWeight, go_together
from lorax.models import Model
from lorax.models.llama import LlamaAttention, LlamaLayer, LlamaMLP, LlamaModel, RMSNorm
from lorax.models.rope import rotations
from lorax.models.watched import is_watched
from lorax.quant.linear import QuantizedLinear

BUCKET, MOST_GRAPHS, MOST_ROWS = 256, 32, 16
STEP = 128  # what a product takes of K at a time


@dataclass(frozen=True)
class Product:
    """Linears with one input, as lorax.kernels.narrow takes them."""

    weights: list[PackedWeight]
    biases: list[Tensor | None]
    paths: list[Any]

    @classmethod
    def of(cls, *modules: nn.Module) -> Product | None:
        """None where one is no four-bit Linear, with or without LoRA, or of another kind."""
        found = [_linear_of(module) for module in modules]
        known = [linear for linear in found if linear is not None]
        weights = [weight for weight, _, _ in known]
        if len(known) < len(found) or not go_together(weights) or weights[0].shape[1] % STEP:
            return None
        return cls(weights, [bias for _, bias, _ in known], [path for _, _, path in known])


@dataclass(frozen=True)
class Layer:
    """A layer's norms and products."""

    norms: tuple[RMSNorm, RMSNorm]
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    head_dim: int
    heads: int
    kv_heads: int
    window: int | None
    scale: float | None


@dataclass
class Inputs:
    """What a graph reads and gives: (B,) int64 each, and hidden (B, C)."""

    tokens: Tensor
    slots: Tensor
    lengths: Tensor
    hidden: Tensor
    replay: Callable[[], None]


class Decoder:
    """Steps the rows of a cache, a token each."""

    def __init__(
        self,
        model: Model,
        layers: list[Layer],
        cache: RowsCache,
        kernels: Any,
        capture: Capture | None = None,
    ):
        body: Any = model.body
        self.embedding, self.norm, self.scaled = body.embed_tokens, body.norm, body.scaled
        self.layers, self.cache, self.kernels = layers, cache, kernels
        like = body.embed_tokens.weight
        self.capture = CudaCapture() if capture is None else capture
        self.places = cache.all.keys.shape[3]
        self.cos, self.sin = rotations(body.config, 0, self.places, like)
        self.graphs: dict[tuple[int, int, bool], Inputs] = {}

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """The hidden states (B, C) behind the last norm; each slot holds one token more.

        The result is written over by the next call.
        """
        lengths = [self.cache.lengths[slot] for slot in slots]
        end = min(self.places, -(-(max(lengths) + 1) // BUCKET) * BUCKET)
        whole = list(slots) == list(range(self.cache.all.keys.shape[1]))
        key = (len(slots), end, whole)
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[key] = self._captured(slots, tokens, lengths, end, whole)
        inputs = self.graphs[key]
        self._fill(inputs, slots, tokens, lengths)
        inputs.replay()
        for slot in slots:
            self.cache.lengths[slot] += 1
        return inputs.hidden

    def _captured(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        lengths: Sequence[int],
        end: int,
        whole: bool,
    ) -> Inputs:
        device = self.embedding.weight.device
        ids, at, there = (torch.zeros_like(torch.tensor(slots), device=device) for _ in range(3))
        hidden = self.embedding.weight.new_zeros(len(slots), self.embedding.weight.shape[1])
        inputs = Inputs(ids, at, there, hidden, lambda: None)
        self._fill(inputs, slots, tokens, lengths)  # warming up stores what the replay will store
        inputs.replay = self.capture(lambda: self._run(inputs, end, whole))
        return inputs

    def _fill(
        self, inputs: Inputs, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]
    ) -> None:
        rows = torch.tensor([tokens, slots, lengths], dtype=torch.int64)
        for static, values in zip((inputs.tokens, inputs.slots, inputs.lengths), rows, strict=True):
            static.copy_(values, non_blocking=True)

    def _run(self, inputs: Inputs, end: int, whole: bool) -> None:
        """One pass of all layers: what is captured."""
        k = self.kernels
        cos, sin = self.cos[inputs.lengths], self.sin[inputs.lengths]  # (B, D)
        places = torch.arange(end, device=cos.device)
        total, delta = self.scaled(self.embedding(inputs.tokens)), None  # (B, C)
        for index, layer in enumerate(self.layers):
            norm = layer.norms[0]
            total, n, _ = k.norm(total, norm.weight, norm.eps, delta)
            y = multiply(k, n, layer.qkv)
            k.rope_(y, cos, sin, layer.heads + layer.kv_heads)
            attended = self._attend(index, layer, y, inputs, places, whole)
            norm = layer.norms[1]
            total, n, _ = k.norm(total, norm.weight, norm.eps, multiply(k, attended, layer.o))
            delta = multiply(k, k.swiglu(multiply(k, n, layer.gate_up)), layer.down)
        k.norm(total, self.norm.weight, self.norm.eps, delta, inputs.hidden)

    def _attend(
        self, index: int, layer: Layer, y: Tensor, inputs: Inputs, places: Tensor, whole: bool
    ) -> Tensor:
        """Store each row's key and value; what its query makes of all that are there: (B, H D)."""
        B, H, K, D = y.shape[0], layer.heads, layer.kv_heads, layer.head_dim
        query, key, value = y.view(B, H + 2 * K, D).split([H, K, K], 1)
        at = inputs.slots[:, None], torch.arange(K, device=y.device), inputs.lengths[:, None]
        stored = []
        for kept, new in ((self.cache.all.keys, key), (self.cache.all.values, value)):
            kept[index].index_put_(at, new)
            seen = kept[index, :, :, : len(places)]  # (slots, K, S, D)
            stored.append(seen if whole else seen[inputs.slots])
        own = places <= inputs.lengths[:, None]  # (B, S)
        if layer.window is not None:
            own = own & (places > inputs.lengths[:, None] - layer.window)
        grouped = query.reshape(B, K, H // K, D)  # the heads of one key head, as queries
        mask = own[:, None, None].expand(-1, -1, H // K, -1)
        keys, values = stored
        attended = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=layer.scale)
        return attended.reshape(B, H * D)


def multiply(kernels: Any, x: Tensor, product: Product) -> Tensor:
    """The outputs of a product's Linears, side by side: (B, N_1 + N_2 + ...)."""
    y: Tensor = kernels.products(x, product.weights, product.biases, product.paths)
    return y


def kernels_for(x: Tensor) -> Any:
    """The kernels, if Triton computes with tensors like x; else None."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    return import_module("lorax.kernels.step") if halves and uses_triton(x) else None


def decoder_of(model: Model, cache: RowsCache, capture: Capture | None = None) -> Decoder | None:
    """A decoder for the model's rows in that cache; None where one of its layers is not known."""
    body = model.body
    if type(body) is not LlamaModel or is_watched(body) or cache.all.keys.shape[1] > MOST_ROWS:
        return None
    config, embedding = body.config, body.embed_tokens
    if type(embedding) is not nn.Embedding or is_watched(embedding):
        return None
    kernels = kernels_for(embedding.weight)
    lengthwise = config.dynamic_scaling is not None or config.longrope_scaling is not None
    if kernels is None or lengthwise or config.rotary_dim != config.head_dim:
        return None
    if not is_as_known(LlamaModel):
        return None
    if not _is_plain_norm(body.norm, embedding.weight):
        return None
    layers = [_layer_of(layer, embedding.weight) for layer in body.layers]
    found = [layer for layer in layers if layer is not None]
    return Decoder(model, found, cache, kernels, capture) if len(found) == len(layers) else None


def _layer_of(layer: Any, like: Tensor) -> Layer | None:
    """The layer, if it is a Llama's and nobody watches it."""
    if type(layer) is not LlamaLayer:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    known = type(attention) is LlamaAttention and type(mlp) is LlamaMLP
    known = known and all(_is_plain_norm(norm, like) for norm in norms)
    if not known or any(is_watched(module) for module in (layer, attention, mlp)):
        return None
    if attention.has_norms or attention.cap is not None or mlp.activation is not F.silu:
        return None
    qkv = Product.of(attention.q_proj, attention.k_proj, attention.v_proj)
    o, down = Product.of(attention.o_proj), Product.of(mlp.down_proj)
    gate_up = Product.of(mlp.gate_proj, mlp.up_proj)
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    heads, kv_heads = (qkv.weights[i].shape[0] // attention.head_dim for i in (0, 1))
    sizes = attention.head_dim, heads, kv_heads, attention.window, attention.scale
    return Layer(norms, qkv, o, gate_up, down, *sizes)


def _is_plain_norm(norm: Any, like: Tensor) -> bool:
    return type(norm) is RMSNorm and norm.weight.dtype == like.dtype and not is_watched(norm)


def _linear_of(module: nn.Module) -> tuple[PackedWeight, Tensor | None, Any] | None:
    """Its weight, bias and path (A, B, scaling), if it is a four-bit Linear, with LoRA or not."""
    path, base = None, module
    if type(module) is LoRALinear:
        plain = module.merged is None and module.lora_B_bias is None and not is_watched(module)
        if not plain or module.drops:
            return None
        base = module.base_layer
        if module.enabled:
            path = module.lora_A.detach(), module.lora_B.detach(), module.scaling
    if type(base) is not QuantizedLinear or is_watched(base):
        return None
    weight = base.quantized.operands()
    bias = None if base.bias is None else base.bias.detach()
    return None if weight is None else (weight, bias, path)
