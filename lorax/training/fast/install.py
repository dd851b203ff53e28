"""`accelerated`: the fast path for as long as a run lasts, put on from outside.

Modules of exactly these classes get a method of their own, which asks at each call whether the fast
path takes them as they are now, and else calls the plain one:

    LoRALinear        projections.py
    LlamaMLP          mlp.py
    LlamaAttention    projections.py for q, k and v together, and attention.py
    RMSNorm           norm.py
    LlamaModel        lorax/training/gpu: a whole layer at once, on CUDA
    the model         head.py, which the loss asks for; on CUDA, graphs of whole steps

An instance's method goes before its class's, so nothing of the model has to know. A copy of the
model has methods that are bound to the copy, and a pickled one has the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.as_known import is_as_known
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.models.attention import Context
from lorax.models.llama import LlamaAttention, LlamaMLP, LlamaModel, RMSNorm, Rope
from lorax.models.packed import Documents
from lorax.models.watched import is_watched
from lorax.training.fast.attention import causal_attention, is_faster
from lorax.training.fast.head import fast_head_loss
from lorax.training.fast.mlp import swiglu_mlp
from lorax.training.fast.norm import rms_norm
from lorax.training.fast.parts import Part, part_of, takes
from lorax.training.fast.projections import project
from lorax.training.gpu import known
from lorax.training.gpu.graphs import step_graphs
from lorax.training.gpu.layer import run_layer
from lorax.training.gpu.seeds import begin_pass, seed_of, took


@contextmanager
def accelerated(model: Any, on: bool = True) -> Iterator[None]:
    """The fast path inside, where a module is known to it; on = False changes nothing.

    model: with its adapter, on any device. Modules that are put in later, watched ones
        (lorax/models/watched.py) and classes that somebody edited (lorax/adapters/as_known.py) stay
        plain.
    """
    kinds = [kind for kind in _METHODS if on and is_as_known(kind)]
    modules = [m for m in model.modules() if type(m) in kinds and not is_watched(m)]
    for module in modules:
        for method in _METHODS[type(module)]:
            setattr(module, method.__name__, MethodType(method, module))
    if on:
        model.head_loss = fast_head_loss
        model.step_graphs = step_graphs(model)
    try:
        yield
    finally:
        if on:
            del model.head_loss, model.step_graphs
        for module in modules:
            for method in _METHODS[type(module)]:
                delattr(module, method.__name__)


class _LoRALinear:
    @staticmethod
    def forward(self: LoRALinear, x: Tensor) -> Tensor:
        parts = _parts(x, self)
        return AdapterLayer.forward(self, x) if parts is None else project(x, parts)[0]


class _LlamaMLP:
    @staticmethod
    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        parts = None
        if self.activation is F.silu:
            parts = _parts(x, self.gate_proj, self.up_proj, self.down_proj)
        return LlamaMLP.forward(self, x) if parts is None else swiglu_mlp(x, *parts)


class _LlamaAttention:
    @staticmethod
    def project(self: LlamaAttention, x: Tensor) -> tuple[Tensor, ...]:
        parts = _parts(x, self.q_proj, self.k_proj, self.v_proj)
        return LlamaAttention.project(self, x) if parts is None else project(x, parts)

    @staticmethod
    def forward(self: LlamaAttention, x: Tensor, rope: Rope, context: Context) -> Tensor:
        lengths = _lengths(self, x, rope, context)
        if lengths is None:
            return LlamaAttention.forward(self, x, rope, context)
        heads = (part.unflatten(-1, (-1, self.head_dim)) for part in self.project(x))
        query, key, value = heads  # (B, T, H, D), (B, T, K, D) twice
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        y: Tensor = self.o_proj(causal_attention(query, key, value, rope, lengths, self.scale))
        return y


class _RMSNorm:
    @staticmethod
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        if not takes(x) or self.weight.requires_grad or self.weight.dtype != x.dtype:
            return RMSNorm.forward(self, x)
        return rms_norm(x, self.weight, self.eps)


class _LlamaModel:
    @staticmethod
    def run(self: LlamaModel, layer: nn.Module, *inputs: Any) -> Tensor:
        if not known.kernels_for_step(inputs[0]):
            return LlamaModel.run(self, layer, *inputs)
        if layer is self.layers[0]:
            begin_pass(self, inputs[0].device)
        x, rope, context = inputs
        halves = known.halves_of(layer, x, rope, context, seed_of(self))
        if halves is None:
            return LlamaModel.run(self, layer, *inputs)
        took(self, layer)
        return run_layer(inputs[0], *halves, self.gradient_checkpointing)


_METHODS: dict[type[nn.Module], list[Callable[..., Any]]] = {
    LoRALinear: [_LoRALinear.forward],
    LlamaMLP: [_LlamaMLP.forward],
    LlamaAttention: [_LlamaAttention.project, _LlamaAttention.forward],
    RMSNorm: [_RMSNorm.forward],
    LlamaModel: [_LlamaModel.run],
}


def _lengths(
    module: LlamaAttention, x: Tensor, rope: Rope, context: Context
) -> Sequence[int] | None:
    """The sequences behind each other in x (B, T, C), where nothing but causality hides a token.

    None where something does, where a cache holds more, where a head turns in part, or where
    torch's attention is faster.
    """
    T, widest = x.shape[1], module.window
    lengths = [T] if type(context) is Context else None
    if type(context) is Documents:
        lengths = list(context.lengths)
    plain = module.cap is None and rope[0].shape[-1] == module.head_dim
    if lengths is None or not plain or not takes(x) or sum(lengths) != T:
        return None
    longest = max(lengths)
    seen = widest is None or longest <= widest
    return lengths if seen and is_faster(x.dtype, longest) else None


def _parts(x: Tensor, *modules: nn.Module) -> list[Part] | None:
    """The modules as parts for that input (..., in); None if one has to compute by itself."""
    if not takes(x):
        return None
    found = []
    for module in modules:
        part = part_of(module, x)
        if part is None:
            return None
        found.append(part)
    return found
