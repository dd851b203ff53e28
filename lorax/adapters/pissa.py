"""LoRA that starts inside the weight: PiSSA and OLoRA. The base is never written to.

    "pissa"           the r largest singular components of W (Meng et al., arXiv:2404.02948)
    "pissa_niter_K"   the same by a randomized SVD with K power iterations
    "olora"           the first r columns and rows of W = Q R (Buyukakyuz, arXiv:2406.01775)

With W = U S V^T and the scale s they start at

    PiSSA   B0 = U_r (S_r / s)^1/2      A0 = (S_r / s)^1/2 V_r^T      s B0 A0 = U_r S_r V_r^T
    OLoRA   B0 = Q_r                    A0 = R_r                      s B0 A0 = s Q_r R_r

in float32, whatever W is. Both take s B0 A0 out of the base and train it. Instead of a second dense
weight, the residual W - s B0 A0, the layer keeps the start and adds the difference to the untouched
base:

    y = W x + s (B A - B0 A0) x
      = W x + s [B, B - B0] [A - A0; A0] x            one product, of rank 2r

Both lines are exact. The second one loses nothing to rounding: at the start its products are zero
and the model is its base bit for bit, and on a 16-bit base the two differences, taken in float32,
keep updates that are smaller than the last bit of A. It works over any base, quantized ones too;
switching the adapter off gives the original; r (in + out) more float32 numbers are all it costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.config import NITER, LoRAConfig
from lorax.adapters.lora import LoRALinear
from lorax.adapters.variants import Variant, register_variant
from lorax.errors import AdapterError


class ResidualLoRALinear(LoRALinear):
    """PiSSA's or OLoRA's layer: W x + s (B A - B0 A0) x.

    start_a (r, in), start_b (out, r): A0 and B0, float32 buffers.
    """

    moves_base = True
    decomposes = True
    start_a: Tensor
    start_b: Tensor

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base, r, scaling, dropout)
        self.register_buffer("start_a", torch.zeros_like(self.lora_A.data))
        self.register_buffer("start_b", torch.zeros_like(self.lora_B.data))

    def initialize(self, how: bool | str) -> None:
        """Decompose the base's weight; "pissa", "pissa_niter_K" or "olora"."""
        A, B = components(self.base_weight(), self.r, self.scaling, str(how))
        for tensor, start in ((self.start_a, A), (self.start_b, B)):
            tensor.copy_(start)
        self.lora_A.data.copy_(A)
        self.lora_B.data.copy_(B)

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """[A - A0; A0] (2r, in) and [B, B - B0] (out, 2r): their product is B A - B0 A0."""
        A, B = super().factors(dtype)
        A0, B0 = self.start_a.to(dtype), self.start_b.to(dtype)
        return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)

    def adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Dropout is the path's alone: the residual sees all of x."""
        if not (self.dropout and self.training):
            return super().adapted(x)
        y = self.base_layer(x)
        kept = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
        start = F.linear(x, self.start_a.to(x.dtype))  # (..., r)
        h = torch.cat([kept - start, start], dim=-1)  # (..., 2r)
        return y + self.scaling * F.linear(h, self.factors()[1].to(x.dtype))

    def plain_tensors(self) -> dict[str, Tensor]:
        """Those of the difference, s [B, B - B0] [A - A0; A0]: a plain LoRA of rank 2r."""
        with torch.no_grad():
            A, B = self.factors()
        return super().plain_tensors() | {"lora_A.weight": A, "lora_B.weight": B}

    def plain_layer(self) -> LoRALinear:
        """LoRA of rank 2r over the same base."""
        return as_lora(self, self.base_layer)

    def stored_base(self) -> Tensor:
        """The residual W - s B0 A0, (out, in), which PEFT takes for the base."""
        weight = self.base_weight()
        start = (self.start_b @ self.start_a).mul_(self.scaling)
        return (weight.float() - start).to(weight.dtype)


def components(weight: Tensor, r: int, scaling: float, how: str) -> tuple[Tensor, Tensor]:
    """The components of a weight that PiSSA or OLoRA trains.

    Args:
        weight: (out, in), any float.
        r: how many; at most min(out, in).
        scaling: s; PiSSA's must be above zero.
        how: "pissa", "pissa_niter_K" or "olora".

    Returns:
        A0 (r, in) and B0 (out, r), float32.

    Raises:
        AdapterError: more components than there are, a scale that leaves no root, or a weight that
            is not finite.
    """
    weight = weight.float()
    check_components(weight, r, scaling if how != "olora" else 1.0, how)
    if how == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    U, S, Vt = largest_components(weight, r, how)
    root = (S / scaling).sqrt()
    return (root[:, None] * Vt).contiguous(), (U * root).contiguous()


def largest_components(weight: Tensor, r: int, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V^T (r, in) of the r largest singular values."""
    random = NITER.fullmatch(how)
    if random is not None:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(random.group(1)))
        return U, S, V.t()
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r]


def check_components(weight: Tensor, r: int, scaling: float, how: str) -> None:
    """Refuse what has no r components to start from.

    Raises:
        AdapterError: see `components`.
    """
    if r > min(weight.shape):
        raise AdapterError(
            f"init_lora_weights = {how!r} with r = {r}, but a weight of {tuple(weight.shape)} has "
            f"{min(weight.shape)} components; take a smaller r or a rank_pattern"
        )
    if scaling <= 0:
        raise AdapterError(
            f"init_lora_weights = {how!r} divides by the scale's root, and the scale is "
            f"{scaling:g}; expected lora_alpha > 0"
        )
    if not torch.isfinite(weight).all():
        raise AdapterError(
            f"init_lora_weights = {how!r}: the base's weight is not finite"
            "; get the checkpoint anew, or leave that module out of target_modules"
        )


def as_lora(layer: LoRALinear, base: nn.Module) -> LoRALinear:
    """A plain LoRA with the layer's `plain_tensors` over `base`; switches and flags as they are."""
    found = layer.plain_tensors()
    A, B = found["lora_A.weight"], found["lora_B.weight"]
    plain = LoRALinear(base, A.shape[0], layer.scaling, layer.dropout)
    for mine, value, before in ((plain.lora_A, A, layer.lora_A), (plain.lora_B, B, layer.lora_B)):
        mine.data.copy_(value)
        mine.requires_grad_(before.requires_grad)
    plain.enabled = layer.enabled
    return plain.train(layer.training)


def _needs_base(what: str) -> str:
    return (
        f"{what}, so what it adds depends on its base; load it there and save_adapter(plain=True), "
        "or take Adapter.of(model)"
    )


for _name, _title in (("pissa", "PiSSA"), ("olora", "OLoRA")):
    register_variant(
        Variant(
            _name,
            LoRAConfig,
            title=_title,
            in_peft=True,
            summary=lambda config, title=_title: (  # type: ignore[misc]
                f"{title} of rank {config.r}, lora_alpha {config.lora_alpha:g}"
            ),
            layer=ResidualLoRALinear,
            chosen=lambda config, name=_name: (  # type: ignore[misc]
                config.starts_inside and str(config.init_lora_weights).startswith(name)
            ),
            tags=("lora",),
            no_matrix_alone=_needs_base(f"init_lora_weights = {_name!r}"),
        )
    )
