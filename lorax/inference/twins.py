"""The model once more for generation: the same tensors, with faster modules around them.

    Linear, QuantizedLinear, LoRALinear around either   -> FastLinear
    RMSNorm, GemmaRMSNorm                               -> FastNorm
    anything else                                       as it is

A twin computes what its module computes, from the module's own tensors: few rows by native.c, more
by PyTorch. What it does not know stays: another dtype or device, a variant whose layer computes
something else than W x + s B A x, a module with hooks. The models' own files say what a layer is,
here as in training, so that each family, a researcher's too, gets the twins. The model itself is
not touched; what is switched off or merged is taken as it is when the twins are made.
"""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.backend import uses_native
from lorax.inference.native import Product, library
from lorax.models import Model
from lorax.models.gemma2 import GemmaRMSNorm
from lorax.models.llama import RMSNorm
from lorax.quant import codebooks
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear

KINDS = {torch.float32: 0, torch.bfloat16: 1}
FOUR_BIT = 2
MOST_ROWS = 16  # native.c's; beyond, a decoded weight and a matrix product are faster


def with_twins(model: Model) -> Model:
    """A model that shares every tensor with `model` and generates faster; or `model` itself.

    It is for inference: it has no gradients. Where native.c cannot compute, `model` comes back.
    """
    embedding = model.get_parameter(model.embedding_name)
    if embedding.dtype not in KINDS or not uses_native(embedding) or library() is None:
        return model
    twin = _Twins(embedding.dtype).of(model)
    assert isinstance(twin, Model)
    return twin


class _Twins:
    """Makes each module's twin once: shared modules stay shared."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.scratch: dict[torch.dtype, Tensor] = {}
        self.made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.made:
            self.made[id(module)] = self._make(module)
        return self.made[id(module)]

    def _make(self, module: nn.Module) -> nn.Module:
        if module._forward_hooks or module._forward_pre_hooks:
            return module
        if isinstance(module, AdapterLayer):
            return self._of_adapter(module)
        kind = type(module)
        if kind in (nn.Linear, QuantizedLinear):
            return FastLinear(module, None, self) if _covers(module) else module
        if kind in (RMSNorm, GemmaRMSNorm):
            return FastNorm(module) if module.weight.dtype == self.dtype else module
        twin = copy.copy(module)
        twin._modules = {
            name: None if child is None else self.of(child)
            for name, child in module._modules.items()
        }
        return twin

    def _of_adapter(self, layer: AdapterLayer) -> nn.Module:
        if not layer.enabled:
            return self.of(layer.base_layer)
        if layer.merged is not None:
            return self.of(layer.merged)
        if not isinstance(layer, LoRALinear) or not _is_plain(layer):
            return layer
        base = layer.frozen
        has_hooks = bool(base._forward_hooks or base._forward_pre_hooks)
        known = type(base) in (nn.Linear, QuantizedLinear) and _covers(base)
        return FastLinear(base, layer, self) if known and not has_hooks else layer


def _is_plain(layer: LoRALinear) -> bool:
    """Whether it computes what LoRALinear says: W x + s B A x."""
    mine = type(layer)
    return mine.adapted is LoRALinear.adapted and mine.path_onto is LoRALinear.path_onto


def _covers(linear: nn.Module) -> bool:
    """Whether native.c reads the weight as it lies."""
    if isinstance(linear, QuantizedLinear):
        q = linear.quantized
        on_cpu = q.device.type == "cpu"
        return isinstance(q, FourBitTensor) and on_cpu and q.shape[1] % 32 == 0
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.dtype in KINDS and weight.is_contiguous() and weight.device.type == "cpu"


class FastLinear(nn.Module):
    """A Linear, quantized or not, with or without a low-rank path: (..., in) -> (..., out).

    base: its frozen Linear. layer: the adapter's layer around it, or None.
    """

    def __init__(self, base: Any, layer: LoRALinear | None, twins: _Twins):
        super().__init__()
        self.base, self.layer = base, layer
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scratch = twins.scratch
        self.kept: list[Tensor] = []  # what the pointers below point to
        self.product = self._product(twins.dtype)
        self.address = ctypes.addressof(self.product)
        found = library()
        assert found is not None
        self.library = found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # weight, bias, r ...: what a family's own code may ask for
            return getattr(self.layer or self.base, name)

    def _product(self, dtype: torch.dtype) -> Product:
        p = Product(n_in=self.in_features, n_out=self.out_features, rank=0)
        if isinstance(self.base, QuantizedLinear):
            q = self.base.quantized
            assert isinstance(q, FourBitTensor)
            p.kind, p.block = FOUR_BIT, q.block_size
            p.weight, p.scales = self._at(q.packed), self._at(q.scales())
            p.code = self._at(codebooks.four_bit(q.quant_type))
        else:
            p.kind, p.weight = KINDS[self.base.weight.dtype], self._at(self.base.weight)
        bias = None if self.base.bias is None else self.base.bias.float()
        if self.layer is not None:
            A, B = self.layer.factors(dtype)
            p.rank, p.path_kind, p.scaling = A.shape[0], KINDS[dtype], self.layer.scaling
            p.A, p.B = self._at(A), self._at(B)
            if self.layer.lora_B_bias is not None:
                own = self.layer.scaling * self.layer.lora_B_bias
                bias = own if bias is None else bias + own
        p.bias = None if bias is None else self._at(bias)
        return p

    def _at(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        kind = KINDS.get(x.dtype)
        if kind is None or not 0 < rows <= MOST_ROWS:
            return self._many(x, kind)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        self.library.product(
            self.address, x.data_ptr(), y.data_ptr(), kind, rows, torch.get_num_threads()
        )
        return y

    def _many(self, x: Tensor, kind: int | None) -> Tensor:
        """Many rows: as the module itself, a four-bit weight decoded by native.c."""
        if self.product.kind != FOUR_BIT or kind is None:
            return (self.layer or self.base)(x)
        W = self._decoded(x.dtype, kind)
        y = F.linear(x, W, self.base.bias)
        return y if self.layer is None else self.layer.path_onto(y, x)

    def _decoded(self, dtype: torch.dtype, kind: int) -> Tensor:
        size = self.in_features * self.out_features
        if dtype not in self.scratch or self.scratch[dtype].numel() < size:
            self.scratch[dtype] = torch.empty(size, dtype=dtype)
        W = self.scratch[dtype][:size].view(self.out_features, self.in_features)
        self.library.decode(self.address, W.data_ptr(), kind, torch.get_num_threads())
        return W


class FastNorm(nn.Module):
    """A Llama's or a Gemma's RMSNorm: (..., C)."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.offset, self.twice = (0.0, 1) if isinstance(norm, RMSNorm) else (1.0, 0)
        found = library()
        assert found is not None
        self.library = found

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype
        x = x.contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        self.library.rms_norm(
            *(x.data_ptr(), self.weight.data_ptr(), y.data_ptr(), KINDS[x.dtype]),
            *(x.numel() // width, width, self.eps, self.offset, self.twice),
        )
        return y
