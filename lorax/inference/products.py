"""What computes few rows fast in the place of a model's modules: native.c called from PyTorch.

    FastLinear   x W^T + b + s (x A^T) B^T; up to 16 rows by native.c, more by a matrix product
    FastRows     the same for rows that have different adapters (mixed.py)
    Together     several of them with one input
    FastNorm     an RMSNorm, of a Llama or a Gemma
    RowsApart    a module whose rows share something, a row at a time

Each shares the tensors of the module that it stands for, and is for inference: no gradients.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.lora import LoRALinear
from lorax.inference.mixed import MixedLayer, shares_base
from lorax.inference.native import KINDS, Product, has_fast_bfloat16, library
from lorax.models.llama import RMSNorm
from lorax.quant import codebooks
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear

FOUR_BIT = 2
MOST_ROWS = 16  # native.c's; beyond, a decoded weight and a matrix product are faster
Scratch = dict[torch.dtype, Tensor]  # a buffer of the largest weight's size, which all layers share


def covers(linear: nn.Module) -> bool:
    """Whether native.c reads this Linear's weight as it lies."""
    if isinstance(linear, QuantizedLinear):
        q = linear.quantized
        on_cpu = q.device.type == "cpu"
        return isinstance(q, FourBitTensor) and on_cpu and q.shape[1] % 32 == 0
    if type(linear) is not nn.Linear:
        return False
    weight = linear.weight
    return weight.dtype in KINDS and weight.is_contiguous() and weight.device.type == "cpu"


class FastLinear(nn.Module):
    """A Linear, quantized or not, with or without a low-rank path: (..., in) -> (..., out).

    base: its frozen Linear. layer: the adapter's layer around it, or None. dtype: of A and B.
    """

    def __init__(
        self,
        base: Any,
        layer: LoRALinear | None,
        dtype: torch.dtype,
        scratch: Scratch | None = None,
    ):
        super().__init__()
        self.base, self.layer = base, layer
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scratch: Scratch = {} if scratch is None else scratch
        self.kept: list[Tensor] = []  # what the pointers below point to
        self.product = self._product(dtype)
        self.address = ctypes.addressof(self.product)

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
        """(..., in) -> (..., out), in x's dtype."""
        if not are_few(x):
            return self._many(x, KINDS.get(x.dtype))
        return products([self.of_rows(x.numel() // self.in_features)], x)[0]

    def of_rows(self, count: int) -> list[FastLinear]:
        """Which one computes each of so many rows."""
        return [self] * count

    def _many(self, x: Tensor, kind: int | None) -> Tensor:
        """Many rows: as the module itself, but for what native.c decodes faster.

        Where the CPU does not multiply bfloat16, a float32 copy of one weight at a time does.
        """
        dtype = x.dtype
        if dtype == torch.bfloat16 and not has_fast_bfloat16():
            x = x.float()
        if kind is None or self.product.kind == KINDS.get(x.dtype):
            return (self.layer or self.base)(x)
        bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
        y = F.linear(x, self._decoded(x.dtype), bias)
        return (y if self.layer is None else self.layer.path_onto(y, x)).to(dtype)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        size = self.in_features * self.out_features
        if dtype not in self.scratch or self.scratch[dtype].numel() < size:
            self.scratch[dtype] = torch.empty(size, dtype=dtype)
        W = self.scratch[dtype][:size].view(self.out_features, self.in_features)
        threads = torch.get_num_threads()
        compiled_library().decode(self.address, W.data_ptr(), KINDS[dtype], threads)
        return W


class FastRows(nn.Module):
    """A MixedLayer: each row by its own adapter, with the bits that it has in a batch of its own.

    base: the twin of what the layers are around. twins: the layers' own, by the adapters' names.
    """

    def __init__(self, mixed: MixedLayer, base: nn.Module, twins: dict[str, nn.Module]):
        super().__init__()
        self.base, self.rows = base, mixed.rows
        self.twins = dict(twins)
        self.plainly = MixedLayer(base, mixed.rows)
        self.plainly.layers = {
            name: layer if shares_base(layer) else twins[name]
            for name, layer in mixed.layers.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        each = self.each()
        if all(one is each[0] for one in each):
            y: Tensor = each[0](x)
            return y
        linears = self.of_rows(x.numel() // x.shape[-1]) if are_few(x) else []
        return products([linears], x)[0] if linears else self.plainly.adapted(x)

    def each(self) -> list[nn.Module]:
        """What computes each row of the batch."""
        return [self.twins.get(name or "", self.base) for name in self.rows.names]

    def of_rows(self, count: int) -> list[FastLinear]:
        """As FastLinear's; nothing where another kind of module is among them."""
        each = self.each()
        if all(one is each[0] for one in each):
            each = each[:1] * count
        linears = [one for one in each if isinstance(one, FastLinear)]
        return linears if len(linears) == len(each) == count else []


class Together:
    """Modules with one input, in one call of native.c where all of them are Linears that it knows.

    gated: two modules, and silu of the first's output times the second's is what comes out.
    """

    def __init__(self, modules: Sequence[nn.Module], gated: bool = False):
        self.modules, self.gated = modules, gated
        self.are_known = all(isinstance(module, FastLinear | FastRows) for module in modules)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(..., in) -> each (..., out)."""
        few = are_few(x)
        if few and self.are_known:
            known: Any = self.modules
            linears = [module.of_rows(x.numel() // x.shape[-1]) for module in known]
            if all(linears):
                return products(linears, x, self.gated)
        found = [module(x) for module in self.modules]
        if not self.gated:
            return found
        gate, up = found[0].clone(), found[1].contiguous()  # whoever looks on may keep the first
        if not few or gate.dtype != x.dtype or up.dtype != x.dtype:
            return [F.silu(gate).mul_(up)]
        at = gate.data_ptr(), up.data_ptr()
        compiled_library().gate_in_place(*at, KINDS[x.dtype], gate.numel())
        return [gate]


def are_few(x: Tensor) -> bool:
    """Whether x (..., in) has rows for native.c's products, and not for a matrix product."""
    return x.dtype in KINDS and 0 < x.numel() // x.shape[-1] <= MOST_ROWS


def products(linears: Sequence[list[FastLinear]], x: Tensor, gated: bool = False) -> list[Tensor]:
    """native.c's `products`: x (..., in) -> (..., out) by each of `linears`, one a row of x."""
    x = x.contiguous()
    rows = x.numel() // x.shape[-1]
    ys = [x.new_empty(*x.shape[:-1], each[0].out_features) for each in linears[gated:]]
    addresses = [one.address for each in linears for one in each]
    compiled_library().products(
        (ctypes.c_void_p * len(addresses))(*addresses),
        (ctypes.c_void_p * len(ys))(*(y.data_ptr() for y in ys)),
        *(len(linears), x.data_ptr(), KINDS[x.dtype], rows, gated, torch.get_num_threads()),
    )
    return ys


def compiled_library() -> ctypes.CDLL:
    """native.c's functions, where whoever calls knows that they are there."""
    found = library()
    assert found is not None
    return found


class FastNorm(nn.Module):
    """A Llama's or a Gemma's RMSNorm: (..., C)."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.offset, self.twice = (0.0, 1) if isinstance(norm, RMSNorm) else (1.0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        assert x.dtype == self.weight.dtype
        x = x.contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        compiled_library().rms_norm(
            *(x.data_ptr(), self.weight.data_ptr(), y.data_ptr(), KINDS[x.dtype]),
            *(x.numel() // width, width, self.eps, self.offset, self.twice),
        )
        return y


class RowsApart(nn.Module):
    """A module whose numbers for a row depend on the batch's other rows: each row by itself.

    LLM.int8 keeps those columns in 16 bits that are large in any row (arXiv:2208.07339).
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        return torch.cat([self.module(row) for row in x.split(1)])
