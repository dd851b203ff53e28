"""AdamW with its moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861).

A parameter costs 2.03 bytes of state instead of 8. Both moments are cut into blocks of 256, each
with its absolute maximum in float32; a value is stored as the index of an entry of a dynamic 8-bit
map, which spans seven decades (quant/dynamic_map.py):

    exp_avg          uint8     n          codes of the signed map
    exp_avg_absmax   float32   n / 256
    exp_avg_sq       uint8     n          codes of the unsigned map
    exp_avg_sq_absmax float32  n / 256

A step decodes a block, takes AdamW's own step in float32, and encodes the moments again; the
parameters see the moments before they are rounded.

**Where nearest codes go wrong.** The step divides by sqrt(v). Two things must not happen to v:

1. *v becomes zero while m does not.* v spans twice the decades of m. In a block where one gradient
   is 2,500 times another, the small one's v is 1.6e-7 of the largest and rounds to zero, its m is
   4e-4 of the largest and does not: where its gradient then rests for a step, that step is m / eps,
   thousands of learning rates. So a v above zero never gets code 0 here; the least entry, 3.25e-7,
   makes such steps smaller instead.
2. *v gets stuck.* With beta2 = 0.999 a step adds 0.001 (g^2 - v). In the lowest decades that is
   less than half the distance to the next entry even when g^2 is 700 v. One large gradient that
   raises the block's scale at the start is enough: the others' v stay where they began, and their
   steps grow to 14 learning rates within 400 steps. So where g^2 exceeds 16 times the
   bias-corrected v, v is rounded up instead of to the nearest: it then follows at least as fast as
   AdamW's own (5 learning rates at worst, measured over such gradients). Among normal gradients
   that is 1 in 16,000; there the codes are the nearest.

bitsandbytes rounds to the nearest in both cases. Measured on a CPU, its table happens to spare it
the first, and it takes the 12 learning rates of the second.

Tensors with fewer than `min_8bit_size` elements keep float32 moments. On CUDA one Triton kernel
does all of this, with the same codes (`fused.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lorax.errors import UsageError
from lorax.kernels.hyper import OUTGROWN, AdamWStep
from lorax.optim.adamw import AdamW, FloatMoments, adamw_
from lorax.optim.flat import ALIGNMENT, Hyperparameters, Moments, carve, round_up, state_dtype
from lorax.quant.blockwise import dequantize_blockwise, number_of_blocks, quantize_rows_
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.nearest import NearestTable, nearest_table

SIGNED_ZERO = 127  # the signed map's code of 0; the unsigned map's is 0
SMALLEST_POSITIVE_ABSMAX = 1e-30  # times the unsigned map's least value still a normal float32


def adamw_8bit_(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    block_size: int,
    hyper: Hyperparameters,
) -> None:
    """One AdamW step in place on 8-bit moments.

    Args:
        p: (n,) float32 parameters, updated; n is a multiple of `block_size`.
        g: (n,) float32 gradients, read only.
        exp_avg, exp_avg_sq: (n,) uint8 codes, updated.
        exp_avg_absmax, exp_avg_sq_absmax: (n / block_size,) float32, updated.
        block_size: values per block.
        hyper: learning rate, betas, eps, weight decay, and the 1-based step.
    """
    signed, unsigned = tables(p.device)
    m, v = torch.empty_like(p), torch.empty_like(p)
    dequantize_blockwise(exp_avg, exp_avg_absmax, signed.values, block_size, m)
    dequantize_blockwise(exp_avg_sq, exp_avg_sq_absmax, unsigned.values, block_size, v)
    adamw_(p, g, m, v, hyper)
    outgrown = g.square() > v * (OUTGROWN / (1 - hyper.beta2**hyper.step))
    rows = (-1, block_size)
    quantize_rows_(m.view(rows), signed, exp_avg.view(rows), exp_avg_absmax)
    quantize_positive_(
        v.view(rows), outgrown.view(rows), unsigned, exp_avg_sq.view(rows), exp_avg_sq_absmax
    )


def quantize_positive_(
    x: Tensor, round_up: Tensor, table: NearestTable, codes: Tensor, absmax: Tensor
) -> None:
    """Quantize whole blocks of values >= 0; only zero itself gets the code of zero.

    Args:
        x: (blocks, block_size) float32, one block a row, >= 0.
        round_up: (blocks, block_size) bool: where True, take the smallest entry >= x instead of the
            nearest.
        table: a codebook that spans [0, 1].
        codes: (blocks, block_size) uint8, overwritten.
        absmax: (blocks,) float32, overwritten; at least 1e-30, so that the smallest nonzero entry
            times absmax is a normal float32.
    """
    torch.amax(x, dim=1, out=absmax).clamp_min_(SMALLEST_POSITIVE_ABSMAX)
    y = (x * absmax.reciprocal()[:, None]).clamp_(max=1)
    nearest = table.codes(y)
    short = table.values.index_select(0, nearest.view(-1).int()).view(y.shape) < y
    torch.maximum(nearest.add_(short & round_up), (x > 0).to(torch.uint8), out=codes)


def tables(device: torch.device) -> tuple[NearestTable, NearestTable]:
    """Lookup tables of the signed map (exp_avg) and the unsigned map (exp_avg_sq) on a device."""
    return nearest_table(dynamic_map(), device), nearest_table(dynamic_map(signed=False), device)


class CodedMoments(Moments):
    """Moments in 8 bits: exp_avg's codes and scales, then exp_avg_sq's."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.align = block_size
        self.kind = (CodedMoments, block_size)

    def nbytes(self, elements: int) -> int:
        """Bytes for the codes and float32 scales of both moments, each aligned."""
        scales = number_of_blocks(elements, self.block_size) * 4
        return 2 * (round_up(elements, ALIGNMENT) + round_up(scales, ALIGNMENT))

    def bind(self, memory: Tensor, elements: int) -> None:
        """Lay codes and scales over `memory` (bytes,) uint8; all codes mean zero."""
        blocks = number_of_blocks(elements, self.block_size)
        self.exp_avg, behind = carve(memory, 0, torch.uint8, elements)
        self.exp_avg_absmax, behind = carve(memory, behind, torch.float32, blocks)
        self.exp_avg_sq, behind = carve(memory, behind, torch.uint8, elements)
        self.exp_avg_sq_absmax, _ = carve(memory, behind, torch.float32, blocks)
        self.exp_avg.fill_(SIGNED_ZERO)  # what alignment leaves behind a tensor must read as zero

    def state(self, start: int, shape: torch.Size) -> dict[str, Tensor]:
        """Views of a parameter's codes, in its shape, and of its blocks' scales (blocks,)."""
        stop = start + shape.numel()
        first, last = start // self.block_size, number_of_blocks(stop, self.block_size)
        return {
            "exp_avg": self.exp_avg[start:stop].view(shape),
            "exp_avg_absmax": self.exp_avg_absmax[first:last],
            "exp_avg_sq": self.exp_avg_sq[start:stop].view(shape),
            "exp_avg_sq_absmax": self.exp_avg_sq_absmax[first:last],
        }

    def read(self, start: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A parameter's moments, decoded to float32, in its shape."""
        state = self.state(start, shape)
        moments = []
        names = ("exp_avg", "exp_avg_sq")
        for name, table in zip(names, tables(self.exp_avg.device), strict=True):
            flat = state[name].view(-1)
            out = torch.empty(flat.shape, device=flat.device)
            dequantize_blockwise(flat, state[f"{name}_absmax"], table.values, self.block_size, out)
            moments.append(out.view(shape))
        return moments[0], moments[1]

    def step_(self, p: Tensor, g: Tensor, start: int, hyper: Hyperparameters) -> None:
        """Step p (n,) along g (n,), whose codes begin at `start`, the first of a block."""
        stop = start + p.numel()
        blocks = slice(start // self.block_size, stop // self.block_size)
        adamw_8bit_(
            p,
            g,
            self.exp_avg[start:stop],
            self.exp_avg_absmax[blocks],
            self.exp_avg_sq[start:stop],
            self.exp_avg_sq_absmax[blocks],
            self.block_size,
            hyper,
        )

    def launch(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        steps: Sequence[AdamWStep],
        factor: Tensor | None = None,
    ) -> None:
        """Step all of them in one launch of the Triton kernel."""
        if not params:
            return
        kernels = import_module("lorax.kernels.adamw")  # needs triton
        names = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
        columns = [[state[name] for state in states] for name in names]
        maps = [table.values for table in tables(params[0].device)]
        kernels.adamw_8bit(params, grads, *columns, steps, *maps, self.block_size, factor)


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments; takes `AdamW`'s arguments as well.

    Args:
        block_size: values per scale, a power of two from 16 to 4096.
        min_8bit_size: tensors with fewer elements keep float32 moments.

    A parameter group may set both.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        **kwargs: Any,
    ):
        self._sizes = {"block_size": block_size, "min_8bit_size": min_8bit_size}
        super().__init__(params, *args, **kwargs)

    def _more_defaults(self) -> dict[str, Any]:
        return self._sizes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `AdamW`.

        Raises:
            UsageError: block_size is no power of two from 16 to 4096, or min_8bit_size is negative.
        """
        block_size = param_group.get("block_size", self.defaults["block_size"])
        if block_size not in [2**i for i in range(4, 13)]:
            raise UsageError(
                f"optimizer: block_size = {block_size}; expected a power of two from 16 to 4096"
            )
        if param_group.get("min_8bit_size", self.defaults["min_8bit_size"]) < 0:
            raise UsageError("optimizer: min_8bit_size is negative; expected 0 or more")
        super().add_param_group(param_group)

    def _moments(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Moments:
        if parameter.numel() < group["min_8bit_size"] or parameter.dtype == torch.float64:
            return FloatMoments(state_dtype(parameter))
        return CodedMoments(group["block_size"])
