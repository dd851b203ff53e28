"""DoRA: the magnitude and the direction of a weight, trained apart (Liu et al., arXiv:2402.09353).

    V = W0 + s B A                                  (out, in), never formed
    y = g * (V x) + bias,  g = m / norm(V)          m, norm(V), g: (out,), one number a row

m (`lora_magnitude_vector`) starts as norm(V), so g is 1 and the model is its base. As the paper
proposes (section 4.3) the norm is a constant for the gradient. The bias stays outside.

The norm changes with every step. PEFT forms V for it, which costs as much as a product with `in`
rows; but of norm(V)^2 = ||W0||^2 + 2 s <W0, B A> + s^2 ||B A||^2, by row, only two sums of r
products change:

    rowsum((W0 A^T) * B)         W0 times the r rows of A, like r more rows of x
    rowsum((B (A A^T)) * B)      (r, r) in between

||W0||^2 is computed once, in float64. Without gradients the norm is kept until A or B change.

With dropout at work PEFT computes W0 x + bias + (g - 1) * (W0 x') + g * (s B A x'), with x' the
input after dropout: two products with W0, here too. Without dropout x' = x, and one is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.embedding import LoRAEmbedding
from lorax.adapters.lora import LoRALinear
from lorax.adapters.variants import Variant, register_variant
from lorax.quant.linear import QuantizedLinear, dequantize_into_scratch

CHUNK_VALUES = 2**18  # of a 16-bit weight that are in float32 at a time: 1 MiB


class DoRALinear(LoRALinear):
    """A frozen Linear whose rows' lengths and low-rank changed directions are trained.

    Args: as for `LoRALinear`, without lora_bias: PEFT does not define the two together.
    """

    starts_exact = False

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base, r, scaling, dropout)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(self.out_features, device=self.device))
        self._norms = RowNorms()

    def initialize(self, how: bool | str) -> None:
        """A and B as in LoRA; the magnitudes are the rows' norms."""
        super().initialize(how)
        self._norms = RowNorms()
        with torch.no_grad():
            norms = self._norms.computed(self._weight(), self.lora_A, self.lora_B, self.scaling)
            self.lora_magnitude_vector.copy_(norms)

    def adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        bias = self.base_layer.bias
        if not self.drops:
            fused = self._fused(x)
            if fused is not None:
                return _Rescale.apply(fused, self.gain(), bias)
            return self.path_onto(self.base_layer(x), x)  # a decoded W0 is still in the scratch
        y = self.base_layer(x)
        x = self.dropped(x)
        base = self.base_layer(x)
        if bias is not None:
            base = base - bias
        return y + (_Rescale.apply(super().path_onto(base, x), self.gain(), None) - base)

    def path_onto(self, y: Tensor, x: Tensor) -> Tensor:
        """g (y - bias + the path of x) + bias, where y is the base's for x, without dropout."""
        return _Rescale.apply(super().path_onto(y, x), self.gain(), self.base_layer.bias)

    def gain(self) -> Tensor:
        """g = m / norm(V), (out,) float32; the gradient goes to m."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        return _gain(self.lora_magnitude_vector, self._norms(self._weight, A, B, self.scaling))

    def _weight(self) -> Tensor:
        """W0, in its own dtype; a quantized one decoded into the scratch buffer."""
        base = self.base_layer
        if isinstance(base, QuantizedLinear):
            return dequantize_into_scratch(base.quantized, base.dtype)
        return self.base_weight()

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B, and the magnitudes, (out,)."""
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """g * (W0 + s B A), (out, in); here V is formed, and its norm is taken from it."""
        V = super().effective_weight(dtype)
        return V * _gain(self.lora_magnitude_vector.detach().to(dtype), V.norm(dim=1))[:, None]


class DoRAEmbedding(LoRAEmbedding):
    """A frozen Embedding whose columns' lengths and low-rank changed directions are trained.

    The table is a Linear's weight laid on its side: a magnitude for each of the dim columns.
    """

    starts_exact = False

    def __init__(self, base: nn.Embedding, r: int, scaling: float):
        super().__init__(base, r, scaling)
        dim = base.weight.shape[1]
        self.lora_magnitude_vector = nn.Parameter(torch.ones(dim, device=self.device))
        self._norms = RowNorms()

    def initialize(self, how: bool | str) -> None:
        """A and B as in LoRA; the magnitudes are the columns' norms."""
        super().initialize(how)
        self._norms = RowNorms()
        A, B = self.lora_embedding_A.detach(), self.lora_embedding_B.detach()
        norms = self._norms.computed(self._weight(), A, B, self.scaling)
        self.lora_magnitude_vector.data.copy_(norms)

    def path_onto(self, y: Tensor, ids: Tensor) -> Tensor:
        """g (y + the low-rank rows of ids): (..., dim), (...) int64 -> (..., dim)."""
        return _Rescale.apply(super().path_onto(y, ids), self.gain(), None)

    def gain(self) -> Tensor:
        """g = m / norm(V), (dim,) float32; the gradient goes to m."""
        A, B = self.lora_embedding_A.detach(), self.lora_embedding_B.detach()
        return _gain(self.lora_magnitude_vector, self._norms(self._weight, A, B, self.scaling))

    def _weight(self) -> Tensor:
        return self.base_weight().t()  # (dim, vocab)

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B, and the magnitudes, (dim,)."""
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(W + s (B A)^T) * g, (vocab, dim)."""
        V = super().effective_weight(dtype)
        return V * _gain(self.lora_magnitude_vector.detach().to(dtype), V.norm(dim=0))


class RowNorms:
    """The norms of the rows of W0 + s B A, without forming it."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None  # ||W0||^2 by row, float64
        self.last: tuple[Tensor, Tensor, Tensor] | None = None  # A, B and their norms

    def __call__(
        self, weight: Callable[[], Tensor], A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        """(out,) float32.

        Args:
            weight: gives W0 (out, in) of any dtype; it is not called where the norms are known.
            A: (r, in). B: (out, r).
            scaling: s.
        """
        if torch.is_grad_enabled():
            self.last = None
            return self.computed(weight(), A, B, scaling)
        if self.last is None or not (_same(self.last[0], A) and _same(self.last[1], B)):
            self.last = A.clone(), B.clone(), self.computed(weight(), A, B, scaling)
        return self.last[2]

    def computed(self, W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """The same of W0 itself, anew."""
        if self.squares is None or self.squares.device != W.device:
            self.squares = torch.cat([rows.double().square().sum(1) for rows in _chunks(W)])
        mixed = (_row_products(W, A) * B).sum(1)
        own = ((B @ (A @ A.t())) * B).sum(1)
        squares = self.squares + 2 * scaling * mixed + scaling**2 * own
        return squares.clamp_min(0).sqrt().to(A.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def _chunks(W: Tensor) -> tuple[Tensor, ...]:
    return W.split(max(1, CHUNK_VALUES // W.shape[1]))


def _row_products(W: Tensor, A: Tensor) -> Tensor:
    """W A^T in A's dtype: (out, in), (r, in) -> (out, r)."""
    if W.dtype == A.dtype:
        return W @ A.t()
    return torch.cat([rows.to(A.dtype) @ A.t() for rows in _chunks(W)])


def _gain(magnitudes: Tensor, norms: Tensor) -> Tensor:
    """m / norm; 0 where a row is all zeros, which PEFT would make NaN."""
    return magnitudes / norms.where(norms > 0, torch.inf)


class _Rescale(torch.autograd.Function):
    """y = u + (u - bias) * (g - 1): g times what is not bias, in one pass.

    u (..., out); g (out,) float32; bias (out,), part of u, or None. Said with g - 1, a g of 1 gives
    u's own bits, and one near 1 keeps its digits in 16 bits, where g itself would be rounded to 1.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        more = (gain - 1).to(u.dtype)
        scaled = u if bias is None else u - bias
        ctx.save_for_backward(scaled, more)
        return torch.addcmul(u, scaled, more)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (dy,) = gradients
        scaled, more = ctx.saved_tensors
        du = torch.addcmul(dy, dy, more)
        dgain = (dy * scaled).flatten(0, -2).sum(0, dtype=torch.float32)
        dbias = None
        if ctx.needs_input_grad[2]:
            dbias = -more * dy.flatten(0, -2).sum(0)
        return du, dgain, dbias


register_variant(
    Variant(
        "dora",
        LoRAConfig,
        title="DoRA",
        in_peft=True,
        summary=lambda config: f"DoRA of rank {config.r}, lora_alpha {config.lora_alpha:g}",
        layer=DoRALinear,
        embedding=DoRAEmbedding,
        chosen=lambda config: config.use_dora,
        tags=("lora",),
        no_matrix="has use_dora = True: it is no low-rank matrix alone, and there is no adding or "
        "comparing it",
    )
)
