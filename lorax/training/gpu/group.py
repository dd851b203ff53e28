"""Linears that read the same input, as one product with LoRA's path inside it.

    forward    [ x | h ]  (M, K + R)         h_i = drop_i(x) A_i^T, side by side
               y = [ x | h ] [ W | s B ]^T   (M, N)            one decode, one product
    backward   [ dy | dh ] (M, N + R)        dh_i = s_i dy_i B_i
               dx = [ dy | dh ] [ W ; A ]    (M, K)            one decode, one product
               dB_i = s_i dy_i^T h_i         dA_i = dh_i^T drop_i(x)

So a base weight is decoded once a pass into room that the next weight writes over, y and dx are
written once, and the path costs the product R / K more. x is written into [ x | h ] by whoever
makes it (a norm, SwiGLU), and dy into [ dy | dh ] the same way.

With dropout each Linear drops x its own way, so its share of dx is added behind the product; the
masks are drawn again from the step's seed (lorax/kernels/dropout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorax.kernels.drop import Drop
from lorax.kernels.weight import PackedWeight, go_together, path_width
from lorax.quant.linear import QuantizedLinear
from lorax.training.fast.parts import Part

Gradients = list[Tensor | None]  # of A and B of each part, in their order


@dataclass(frozen=True)
class Group:
    """The parts of one product.

    kernels: lorax.kernels.step or its twins. drops: dropout of each part's input.
    """

    parts: tuple[Part, ...]
    kernels: Any
    drops: tuple[Drop | None, ...]

    @property
    def ranks(self) -> list[int]:
        """Each part's, 0 without a path."""
        return [0 if part.A is None else part.A.shape[0] for part in self.parts]

    @property
    def widths(self) -> list[int]:
        """How many outputs each part has."""
        return [int(_sizes(part)[0]) for part in self.parts]

    def with_path(self, rows: int, width: int, like: Tensor) -> Tensor:
        """Room for a tensor of `width` columns and the paths' beside them: (rows, width + R)."""
        ranks = self.ranks
        R = path_width(ranks)
        room = like.new_empty(rows, width + R)
        if sum(ranks) < R:
            room[:, width + sum(ranks) :].zero_()  # what is summed must be numbers
        return room

    def input(self, rows: int, like: Tensor) -> Tensor:
        """Room for [ x | h ]."""
        return self.with_path(rows, _sizes(self.parts[0])[1], like)

    def gradient(self, rows: int, like: Tensor) -> Tensor:
        """Room for [ dy | dh ]."""
        return self.with_path(rows, sum(self.widths), like)

    def add_hidden(self, xh: Tensor) -> None:
        """h from x, within [ x | h ]."""
        x = xh[:, : _sizes(self.parts[0])[1]]
        for part, drop, h in zip(self.parts, self.drops, self.paths(xh), strict=True):
            if part.A is not None:
                self.kernels.down(x, part.A.detach(), 1.0, h, drop)

    def paths(self, wide: Tensor) -> list[Tensor]:
        """Each part's columns, (M, r_i), of the paths in [ x | h ] or [ dy | dh ]."""
        ranks = self.ranks
        start = wide.shape[1] - path_width(ranks)
        ends = [start + end for end in accumulate(ranks)]
        return [wide[:, end - r : end] for end, r in zip(ends, ranks, strict=True)]

    def forward(self, xh: Tensor, addend: Tensor | None = None) -> Tensor:
        """y (M, N), of [ x | h ]; plus the addend (M, N)."""
        W = self._columns(xh)
        biases = [part.bias for part in self.parts]
        if any(bias is not None for bias in biases):
            pairs = zip(biases, self.widths, strict=True)
            both = torch.cat([xh.new_zeros(n) if b is None else b.detach() for b, n in pairs])
            addend = both if addend is None else addend + both
        return torch.mm(xh, W.t()) if addend is None else torch.addmm(addend, xh, W.t())

    def backward(self, dyh: Tensor, wants_dx: bool = True) -> Tensor | None:
        """dx (M, K) of [ dy | dh ], whose dh is written here."""
        for part, dy, dh in zip(self.parts, self._outputs(dyh), self.paths(dyh), strict=True):
            if part.B is not None:
                self.kernels.down(dy, part.B.detach().t(), part.scaling, dh)
        if not wants_dx:
            return None
        if not any(self.drops):
            return torch.mm(dyh, self._rows(dyh, with_path=True))
        dx = torch.mm(dyh[:, : sum(self.widths)], self._rows(dyh, with_path=False))
        for part, drop, dh in zip(self.parts, self.drops, self.paths(dyh), strict=True):
            if part.A is not None and drop is not None:
                self.kernels.add_dropped(dx, dh, part.A.detach(), drop)
            elif part.A is not None:
                dx.addmm_(dh, part.A.detach().to(dx.dtype))
        return dx

    def factor_gradients(self, dyh: Tensor, x: Tensor, hidden: Sequence[Tensor]) -> Gradients:
        """Those of A and B, behind `backward`. x (M, K); hidden: each part's h (M, r_i)."""
        found: Gradients = []
        sides = zip(self._outputs(dyh), self.paths(dyh), hidden, self.drops, strict=True)
        for part, (dy, dh, h, drop) in zip(self.parts, sides, strict=True):
            if part.A is None or part.B is None:
                found += [None, None]
                continue
            dA = self.kernels.cross(dh, x, 1.0, drop)
            dB = self.kernels.cross(dy, h, part.scaling)
            found += [dA.to(part.A.dtype), dB.to(part.B.dtype)]
        return found

    def _outputs(self, dyh: Tensor) -> tuple[Tensor, ...]:
        return dyh[:, : sum(self.widths)].split(self.widths, 1)

    def _columns(self, like: Tensor) -> Tensor:
        """[ W | s B ], (N, K + R), in room that the next product takes."""
        out = like.new_empty(sum(self.widths), like.shape[1])
        packed = self._packed()
        if packed is not None:
            factors = [None if p.B is None else (p.B.detach(), p.scaling) for p in self.parts]
            decoded: Tensor = self.kernels.decode_columns(packed, factors, out)
            return decoded
        K, row = _sizes(self.parts[0])[1], 0
        out[:, K:].zero_()
        for part, N, path in zip(self.parts, self.widths, self.paths(out), strict=True):
            out[row : row + N, :K].copy_(part.weight(out.dtype, out.dtype))
            if part.B is not None:
                path[row : row + N].copy_(part.B.detach() * part.scaling)
            row += N
        return out

    def _rows(self, like: Tensor, with_path: bool) -> Tensor:
        """W, (N, K); with A below it, (N + R, K)."""
        N, K = sum(self.widths), _sizes(self.parts[0])[1]
        R = path_width(self.ranks) if with_path else 0
        out = like.new_empty(N + R, K)
        factors = [
            part.A.detach() if with_path and part.A is not None else None for part in self.parts
        ]
        packed = self._packed()
        if packed is not None:
            pairs = [None if A is None else (A, 1.0) for A in factors]
            decoded: Tensor = self.kernels.decode_rows(packed, pairs, out)
            return decoded
        row = 0
        for part, n in zip(self.parts, self.widths, strict=True):
            out[row : row + n].copy_(part.weight(out.dtype, out.dtype))
            row += n
        out[row:].zero_()
        for A in factors:
            if A is not None:
                out[row : row + len(A)].copy_(A)
                row += len(A)
        return out

    def _packed(self) -> list[PackedWeight] | None:
        """The four-bit weights, if these are all of one kind."""
        found = []
        for part in self.parts:
            base = part.base
            weight = base.quantized.operands() if isinstance(base, QuantizedLinear) else None
            if weight is None:
                return None
            found.append(weight)
        return found if go_together(found) else None


def _sizes(part: Part) -> tuple[int, int]:
    """Outputs and inputs."""
    base: Any = part.base
    return base.out_features, base.in_features
