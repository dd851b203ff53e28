"""Whether a layer is exactly what the GPU's step computes; asked at each call.

Anything else, a variant's layer, a hook, a trained norm or bias, another activation, a cache in
front of the tokens, is None here, and the layer computes as it always does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.backend import uses_triton
from lorax.kernels.drop import Drop
from lorax.models.attention import Context
from lorax.models.llama import LlamaAttention, LlamaLayer, LlamaMLP, RMSNorm, Rope
from lorax.models.packed import Documents
from lorax.models.watched import is_watched
from lorax.training.fast.parts import Part, part_of
from lorax.training.gpu.group import Group
from lorax.training.gpu.halves import MLP, Attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SITES = 8  # numbers of dropout that a layer has for its seven Linears


def kernels_for_step(x: Tensor) -> Any:
    """The kernels, if Triton computes with tensors like x; else None."""
    if x.dtype not in DTYPES or torch.is_autocast_enabled(x.device.type):
        return None
    if torch.compiler.is_compiling() or not uses_triton(x):
        return None
    return import_module("lorax.kernels.step")


def halves_of(
    layer: nn.Module, x: Tensor, rope: Rope, context: Context, seed: Tensor | None
) -> tuple[Attention, MLP] | None:
    """The layer's halves for this call, with x (B, T, C); None where one is not known.

    seed: (1,) int64, of this pass's dropout; None: there is none.
    """
    kernels = kernels_for_step(x)
    if kernels is None or not _is_known(layer, x, rope, context):
        return None
    assert isinstance(layer, LlamaLayer)
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, LlamaAttention)
    assert isinstance(mlp, LlamaMLP)
    groups: list[Any] = []
    for modules in linears_of(layer):
        parts = [part_of(module, x) for module in modules]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        first_site = attention.index * SITES + sum(len(group.parts) for group in groups)
        groups.append(_group(known, kernels, seed, first_site))
    qkv, o, gate_up, down = groups
    half = Attention(attention, layer.input_layernorm, qkv, o, rope, context, x.shape[0])
    return half, MLP(layer.post_attention_layernorm, gate_up, down)


def linears_of(layer: Any) -> Iterator[tuple[nn.Module, ...]]:
    """A Llama layer's Linears, those with one input together."""
    attention, mlp = layer.self_attn, layer.mlp
    yield attention.q_proj, attention.k_proj, attention.v_proj
    yield (attention.o_proj,)
    yield mlp.gate_proj, mlp.up_proj
    yield (mlp.down_proj,)


def drops(layer: nn.Module) -> bool:
    """Whether dropout is at work in one of the layer's modules."""
    return any(getattr(module, "drops", False) is True for module in layer.modules())


def _group(parts: Sequence[Part], kernels: Any, seed: Tensor | None, first_site: int) -> Group:
    found = []
    for site, part in enumerate(parts, first_site):
        assert seed is not None or not part.dropout
        found.append(Drop(seed, site, part.dropout) if seed is not None and part.dropout else None)
    return Group(tuple(parts), kernels, tuple(found))


def _is_known(layer: nn.Module, x: Tensor, rope: Rope, context: Context) -> bool:
    if type(layer) is not LlamaLayer or type(context) not in (Context, Documents):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not LlamaAttention or type(mlp) is not LlamaMLP:
        return False
    if mlp.activation is not F.silu or rope[0].dim() != 2 or not rope[0].is_contiguous():
        return False
    norms = layer.input_layernorm, layer.post_attention_layernorm
    if attention.has_norms and any(p.requires_grad for p in attention.q_norm.parameters()):
        return False
    if attention.has_norms and any(p.requires_grad for p in attention.k_norm.parameters()):
        return False
    plain = all(_is_plain_norm(norm, x) for norm in norms)
    return plain and not any(is_watched(m) for m in (layer, attention, mlp, *norms))


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    if type(norm) is not RMSNorm or norm.weight.requires_grad:
        return False
    return norm.weight.dtype == x.dtype and norm.weight.device == x.device
