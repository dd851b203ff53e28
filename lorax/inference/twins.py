"""The model once more for generation: the same tensors, with faster modules around them.

    Linear, four-bit QuantizedLinear, LoRALinear around either   -> FastLinear  (products.py)
    MixedLayer, adapters a row                                   -> FastRows
    RMSNorm, GemmaRMSNorm                                        -> FastNorm
    LlamaAttention, LlamaMLP with silu                           -> layers.py
    int8 QuantizedLinear, an adapter's layer around it           -> RowsApart
    anything else                                                   as it is

A twin computes what its module computes, from the module's own tensors. What it does not know
stays: another dtype or device, a variant whose layer computes something else than W x + s B A x, a
module that somebody watches (lorax/models/watched.py). The models' own files say what a layer is,
here as in training, so each family has this, a researcher's too. The model itself is not touched;
what is switched off or merged is taken as it is when the twins are made.

Without a C compiler four-bit weights are decoded once instead, where the memory is there.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from lorax.adapters.as_known import is_as_known
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.adapters.tables import embedding_weight
from lorax.inference.layers import in_fewer_calls
from lorax.inference.mixed import MixedLayer
from lorax.inference.native import KINDS, library, uses_native
from lorax.inference.products import FastLinear, FastNorm, FastRows, RowsApart, Scratch, covers
from lorax.models import Model
from lorax.models.gemma2 import GemmaRMSNorm
from lorax.models.llama import RMSNorm
from lorax.models.watched import is_watched
from lorax.quant.linear import QuantizedLinear
from lorax.quant.tensor import QuantizedTensor

log = logging.getLogger("lorax")


def with_twins(model: Model) -> Model:
    """A model that shares every tensor with `model` and generates faster, without gradients."""
    embedding = embedding_weight(model)
    wanted = embedding.dtype in KINDS and uses_native(embedding)
    native = wanted and library() is not None
    decodes = wanted and not native and _may_decode(model, embedding.dtype)
    twin = _Twins(embedding.dtype, native, decodes).of(model)
    assert isinstance(twin, Model)
    return twin


class _Twins:
    """Makes each module's twin once, so that what is shared stays shared.

    native: whether native.c computes. decodes: whether four-bit weights become dense.
    """

    def __init__(self, dtype: torch.dtype, native: bool, decodes: bool):
        self.dtype, self.native, self.decodes = dtype, native, decodes
        self.scratch: Scratch = {}
        self.made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.made:
            self.made[id(module)] = self._make(module)
        return self.made[id(module)]

    def _make(self, module: nn.Module) -> nn.Module:
        if is_watched(module):
            return module
        if isinstance(module, MixedLayer):
            twins = {name: self.of(layer) for name, layer in module.layers.items()}
            return FastRows(module, self.of(module.base_layer), twins)
        if isinstance(module, AdapterLayer):
            return self._of_adapter(module)
        if self.native and covers(module):
            return FastLinear(module, None, self.dtype, self.scratch)
        if isinstance(module, QuantizedLinear):
            return self._of_quantized(module)
        if self.native and type(module) in (RMSNorm, GemmaRMSNorm) and is_as_known(type(module)):
            return FastNorm(module) if module.weight.dtype == self.dtype else module
        return self._around_twins(module)

    def _of_adapter(self, layer: AdapterLayer) -> nn.Module:
        if not layer.enabled:
            return self.of(layer.base_layer)
        if layer.merged is not None:
            return self.of(layer.merged)
        if any(_mixes_rows(module) for module in layer.modules()):
            return RowsApart(layer)
        known: Any = layer  # a LoRALinear, if it computes as one
        if not _is_plain(layer) or is_watched(known.frozen):
            return layer
        if self.native and covers(known.frozen):
            return FastLinear(known.frozen, known, self.dtype, self.scratch)
        return self._around_twins(layer) if self.decodes else layer

    def _of_quantized(self, module: QuantizedLinear) -> nn.Module:
        if _mixes_rows(module):
            return RowsApart(module)
        return module.dense(self.dtype) if self.decodes else module

    def _around_twins(self, module: nn.Module) -> nn.Module:
        """A copy with twins below it; its tensors are the module's own."""
        twin = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, MethodType) and value.__self__ is module:  # training/fast's
                del twin.__dict__[name]
        twin._modules = {
            name: None if child is None else self.of(child)
            for name, child in module._modules.items()
        }
        if self.native:
            in_fewer_calls(twin)
        return twin


def _is_plain(layer: AdapterLayer) -> bool:
    """Whether it computes what LoRALinear says, W x + s B A x, whatever its class is."""
    mine = vars(LoRALinear)
    return is_as_known(LoRALinear) and all(
        getattr(type(layer), n, None) is mine[n] for n in ("adapted", "path_onto")
    )


def _mixes_rows(module: nn.Module) -> bool:
    """Whether it is quantized with a product of its own, which looks at all rows together."""
    if not isinstance(module, QuantizedLinear):
        return False
    return type(module.quantized).linear is not QuantizedTensor.linear


def _may_decode(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the weights, decoded, take at most half of the free memory; said in one line."""
    needed = sum(q.shape.numel() for q in _decodable(model)) * dtype.itemsize
    fits = 0 < needed <= _free_bytes() // 2
    if needed:
        log.warning(
            "no C compiler here (CC names one): %s for generation, %.2f GB%s",
            "quantized weights are decoded once" if fits else "decoding weights for each token",
            needed / 1e9,
            " more memory" if fits else " would be too much to keep decoded",
        )
    return fits


def _decodable(model: nn.Module) -> Iterator[QuantizedTensor]:
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not _mixes_rows(module):
            yield module.quantized


def _free_bytes() -> int:
    """Of this machine, what the operating system calls available; 0 where it does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
