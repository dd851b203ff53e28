"""LLM.int8: eight-bit weights, eight-bit activations, and the few columns that cannot be either.

Dettmers et al. 2022, arXiv:2208.07339. Each row of the weight and each row of the activations gets
one scale, its largest magnitude, so that a product of two rows needs one multiplication to undo
both ("vector-wise"), and the products themselves run in integers:

    W (out, in)   codes int8 = round(W * (127 / SCB))      SCB (out,) = max |row of W|
    x (M, in)     codes int8 = round(x * (127 / SCX))      SCX (M,)   = max |row of x|
    y (M, out)    = (x codes @ W codes^T) * SCX SCB / 127^2          exact in int32, then float32

In large models a few columns of x are a hundred times larger than the rest, always the same ones,
and would push everything else in their row into a handful of codes. So every column that holds an
outlier, |x| >= 6, leaves the integers and is multiplied as it is:

    x:    . . 9 . . 7 .        ints    . . 0 . . 0 .   @  W codes          the same codes,
          . . . . . 8 .   ->           . . 0 . . 0 .                       the columns empty
          . . 8 . . . .        floats      9     7     @  W[:, 2, 5]       dequantized

8 + 32 / in bits a weight. The gradient passes to x through the dequantized weight, as if x had not
been rounded (straight through); W is frozen.
Rounding x makes y a step function of x, so a network of such layers jumps: on SmolLM2-135M a
change of one part in 10^7 after each layer moves the logits by 4 % of their size, as much as the
format costs in all. Compare two implementations layer by layer, not by their logits.

Codes and scales, of weights and of activations, equal bitsandbytes', and so does the detour by
which it comes to them: everything is cast to float16 first, and a row's scale also sees the small
values in outlier columns. Where lorax departs from bitsandbytes 0.50.2:

  - On a CPU its training mode leaves the scheme: `MatMul8bitFp` multiplies x, not quantized, by the
    dequantized weight, and `MatMul8bitLt` (what eval mode and CUDA run) does what stands above. So
    there a model trains on another function than it is evaluated with. In lorax the mode changes
    nothing.
  - Its CPU code scales the integers with 6.200124e-05, a slip of a digit: 1 / 127^2 is
    6.2000124e-05. All products come out 1.8e-5 too large, seventy times float32's rounding.
  - It rounds to x's dtype before it adds the outliers' part, and again after. Here all parts are
    added in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorax.errors import QuantizationError
from lorax.quant import names
from lorax.quant.blockwise import CHUNK_ELEMENTS
from lorax.quant.checks import check_source, take
from lorax.quant.scratch import output_of
from lorax.quant.state_dict import reader
from lorax.quant.tensor import QuantizedTensor

THRESHOLD = 6.0
FORMAT = names.INT8
_SMALLEST_HALF = 2.0**-24
# 127 * 127 * 1024 < 2^24: so many products add up in float32 without a rounding.
_EXACT_COLUMNS = 1024


@dataclass(frozen=True)
class Int8Tensor(QuantizedTensor):
    """A weight in int8 with one scale a row.

    codes: (out, in) int8; SCB: (out,) float32, bitsandbytes' name for the rows' scales.
    """

    codes: Tensor
    SCB: Tensor
    dtype: torch.dtype

    @property  # the base declares a field, which the other formats store; the codes say it here
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(out, in)."""
        return self.codes.shape

    @property
    def format(self) -> str:
        """The name that `lorax.quantize` takes: "int8"."""
        return FORMAT

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return (self.codes, self.SCB)

    def replaced(self, tensors: Sequence[Tensor]) -> Int8Tensor:
        """The same with other codes and scales."""
        codes, SCB = tensors
        return replace(self, codes=codes, SCB=SCB)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """codes * SCB / 127, as `int8_vectorwise_dequant` computes it, rounded once."""
        out = output_of(self, dtype, out)
        step = max(1, CHUNK_ELEMENTS // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            out[rows].copy_(dequantize_rows(self.codes[rows], self.SCB[rows]))
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under bitsandbytes' names: "weight", "SCB", "weight_format" (0: by rows)."""
        return {
            "weight": self.codes,
            "SCB": self.SCB,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + b with x quantized too: the function `linear` of this file."""
        return linear(x, self, bias)


def quantize(
    weight: Tensor, format: str = FORMAT, *, name: str = "weight", nonfinite: str = "raise"
) -> Int8Tensor:
    """Quantize a weight (out, in) to int8 by rows, through float16.

    Raises:
        QuantizationError: an unknown format, no matrix, a dtype that is no float, or values that
            are not finite, or not in float16's range.
    """
    if format != FORMAT:
        raise QuantizationError(f"{name}: format {format!r} is unknown; expected {FORMAT!r}")
    if weight.dim() != 2:
        raise QuantizationError(
            f"{name}: {FORMAT} needs a matrix (out, in), found {tuple(weight.shape)}; "
            "leave it as it is"
        )
    finite = check_source(weight, name, nonfinite)
    half = weight.detach().to(torch.float16)
    if finite and not torch.isfinite(half).all():
        raise QuantizationError(
            f"{name}: values up to {weight.abs().max().item():g} do not fit float16 (65504), "
            f"through which {FORMAT} goes; take int8-symmetric"
        )
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        codes[rows], scales[rows] = quantize_rows(half[rows])
    return Int8Tensor(codes, scales, weight.dtype)


@reader(lambda names: "SCB" in names or "weight_format" in names)
def from_state_dict(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Int8Tensor:
    """Inverse of `Int8Tensor.state_dict`; `weight_format` may be missing.

    dtype: before quantization, which the tensors do not state.

    Raises:
        QuantizationError: a tensor is missing, damaged or in an old, tiled layout.
    """
    codes = tensors.get("weight")
    if codes is None or codes.dim() != 2 or codes.dtype != torch.int8:
        found = "missing" if codes is None else f"{codes.dtype} {tuple(codes.shape)}"
        raise QuantizationError(f"weight: {found}; expected int8 (out, in)")
    layout = tensors.get("weight_format", torch.zeros((), dtype=torch.uint8))
    if layout.numel() != 1 or layout.item() != 0:
        raise QuantizationError(
            f"weight_format: {layout.flatten().tolist()[:4]}; lorax reads 0, codes by rows, "
            "which bitsandbytes has written since 0.45; quantize the weight anew"
        )
    scales = take(tensors, "SCB", torch.float32, codes.shape[:1])
    if not torch.isfinite(scales).all():
        raise QuantizationError("SCB: a scale is not finite; quantize the weight anew")
    return Int8Tensor(codes.contiguous(), scales, dtype)


def quantize_rows(half: Tensor) -> tuple[Tensor, Tensor]:
    """(M, in) float16 -> codes (M, in) int8 and scales (M,) float32; a row of zeros has scale 0."""
    if half.shape[1] == 0:
        return half.to(torch.int8), half.new_zeros(half.shape[0], dtype=torch.float32)
    scales = half.abs().amax(1).float()
    factor = 127.0 / scales.clamp_min(_SMALLEST_HALF)
    return half.float().mul_(factor[:, None]).round_().to(torch.int8), scales


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """codes (M, k) int8, scales (M,) float32 -> (M, k) float32."""
    return codes.float().mul_(scales[:, None]).mul_(1 / 127)


def quantize_activations(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, in), any float -> codes int8 with empty outlier columns, scales (M,), their indices."""
    half = x.to(torch.float16)
    outliers = half.abs() >= threshold  # what overflows float16 is infinite here: an outlier too
    columns = outliers.any(0).nonzero().flatten()
    if columns.numel():
        half = half.masked_fill(outliers, 0)
    codes, scales = quantize_rows(half)
    return codes.index_fill_(1, columns, 0), scales, columns


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, k) int8, b (N, k) int8 -> a b^T (M, N) int32, exact.

    torch's integer product is fast on a CPU with AVX-512, where it takes any shape (but with k = 1
    torch 2.13 returns memory that nobody wrote), and takes multiples of 8 and at least 17 rows on
    CUDA. Elsewhere a float32 product does the same, exactly, in pieces
    short enough that no sum passes 2^24.
    """
    m, k, n = *a.shape, b.shape[0]
    if a.is_cuda:
        integers = m > 16 and k > 0 and k % 8 == 0 and n % 8 == 0
    else:
        integers = k > 1 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch._int_mm(a, b.t()) if integers else float_integer_matmul(a, b)


def float_integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The same as `integer_matmul`, through float32."""
    y = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_COLUMNS):
        piece = slice(start, start + _EXACT_COLUMNS)
        y += (a[:, piece].float() @ b[:, piece].float().t()).int()
    return y


def linear(
    x: Tensor, weight: Int8Tensor, bias: Tensor | None, threshold: float = THRESHOLD
) -> Tensor:
    """y = x W^T + b as LLM.int8 computes it: (..., in) -> (..., out), in x's dtype."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (M, in)
    codes, scales, columns = quantize_activations(rows, threshold)
    y = integer_matmul(codes, weight.codes).float()  # (M, out)
    y.mul_(scales[:, None] / 127).mul_(weight.SCB / 127)
    if columns.numel():
        W = dequantize_rows(weight.codes[:, columns], weight.SCB)
        y.addmm_(rows[:, columns].float(), W.t())
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
