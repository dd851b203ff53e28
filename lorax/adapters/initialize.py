"""How A and B start.

    True         A kaiming-uniform, B zero: the model starts as its base (Hu et al., 2106.09685)
    "gaussian"   A ~ N(0, 1/r) in standard deviation, B zero
    False        both kaiming-uniform: the adapter changes the model from the start
    "pissa"      the r largest singular components of W (Meng et al., 2404.02948)
    "pissa_niter_K"   the same by a randomized SVD with K power iterations
    "olora"      the first r columns and rows of W = Q R (Buyukakyuz, 2406.01775)
    "loftq"      what quantizing loses of W, as well as rank r can say it (Li et al., 2310.08659)

PiSSA and OLoRA train components that W already has, so the base beside them is what is left, the
residual W - s B0 A0; started.py keeps that without writing to W. With W = U S V^T and the scale s:

    PiSSA   B0 = U_r (S_r / s)^1/2      A0 = (S_r / s)^1/2 V_r^T      s B0 A0 = U_r S_r V_r^T
    OLoRA   B0 = Q_r                    A0 = R_r                      s B0 A0 = s Q_r R_r

LoftQ replaces the base by a quantized one and starts A and B at the rest. It goes around N times:

    Q   <- quantize(W - L R)            L = R = 0 at first
    L R <- the r largest components of W - dequantize(Q)
    B0 = L / s^1/2,  A0 = R / s^1/2     so that Q + s B0 A0 is near W for any lora_alpha

(PEFT leaves s out of the last line: with lora_alpha = 2 r its start is Q + 2 L R, further from W
than Q alone.) All of it in float32, whatever W is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorax.adapters.config import NITER
from lorax.errors import AdapterError
from lorax.quant.four_bit import FourBitTensor, quantize


def fresh(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Draw A (r, in) and B (out, r) in place from torch's global generator."""
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
        nn.init.zeros_(B)
        return
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


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
    _check(weight, r, scaling if how != "olora" else 1.0, how)
    if how == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    U, S, Vt = _largest(weight, r, how)
    root = (S / scaling).sqrt()
    return (root[:, None] * Vt).contiguous(), (U * root).contiguous()


def loftq(
    weight: Tensor, r: int, scaling: float, iterations: int, format: str = "nf4"
) -> tuple[FourBitTensor, Tensor, Tensor]:
    """LoftQ's quantized weight, and A0 (r, in), B0 (out, r) for what it lost, float32.

    Args:
        weight: (out, in), any float.
        r: the rank; at most min(out, in).
        scaling: s, above zero.
        iterations: how often to go around; 1 quantizes W itself.
        format: "nf4", as PEFT, or "nf4-dq".

    Raises:
        AdapterError: as `components`.
    """
    weight = weight.float()
    _check(weight, r, scaling, "loftq")
    rest = weight
    for _ in range(iterations):
        quantized = quantize(rest, format)
        U, S, Vt = _largest(weight - quantized.dequantize(torch.float32), r, "loftq")
        root = S.sqrt()
        L, R = U * root, root[:, None] * Vt
        rest = weight - L @ R
    return quantized, R / math.sqrt(scaling), L / math.sqrt(scaling)


def _largest(weight: Tensor, r: int, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V^T (r, in) of the r largest singular values."""
    random = NITER.fullmatch(how)
    if random is not None:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(random.group(1)))
        return U, S, V.t()
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r]


def _check(weight: Tensor, r: int, scaling: float, how: str) -> None:
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
        raise AdapterError(f"init_lora_weights = {how!r}: the base's weight is not finite")
