"""The slow twins: what each kernel computes, in plain PyTorch, with the same signatures.

They are the oracles of the kernels' tests, and lorax itself does not call them, with one exception:
an operator of torch.library (quant/ops.py, training/fused_loss.py) that gets CPU tensors runs its
twin. On a machine without a GPU, lorax runs lorax/quant, lorax/optim and lorax/training/loss.py.

Quantizing, decoding and AdamW are written a second time here on purpose. kernels/ needs torch and
triton alone, and a twin that shared code with lorax/quant would share its mistakes: the search here
is torch.bucketize, there a table. Tests hold both to the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax.kernels.hyper import AdamWStep
from lorax.kernels.weight import PackedWeight

SMALLEST_POSITIVE_ABSMAX = 1e-30  # times a map's least value it is still a normal float32


def scales(weight: PackedWeight) -> Tensor:
    """The scales in float32, (blocks,): decoded where they are nested, rounded at each step."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_map is not None
    assert weight.nested_offset is not None
    group = torch.arange(weight.absmax.numel(), device=weight.absmax.device) // 256
    values = weight.nested_map[weight.absmax.int()]
    return values * weight.nested_absmax[group] + weight.nested_offset


def dequantize(weight: PackedWeight, out: Tensor, start: int = 0) -> Tensor:
    """Twin of dequantize.dequantize."""
    stop = start + out.numel()
    place = torch.arange(start, stop, device=out.device)
    byte = weight.packed.view(-1)[place // 2].int()
    codes = torch.where(place % 2 == 0, byte >> 4, byte & 15)
    values = weight.code[codes] * scales(weight)[place // weight.block_size]
    out.view(-1).copy_(values)
    return out


def search_tables(code: Tensor) -> tuple[Tensor, Tensor]:
    """What finds the nearest entry of `code` (k,), in any order: boundaries (k - 1,), order (k,).

    order[number of boundaries below y] is the code of the value nearest to y. Where two values are
    equal (FP4's zeros), what lies above them takes the second code, as in bitsandbytes on a CPU.
    """
    ascending, order = code.sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Twin of quantize.quantize_8bit; `code` may have any power of two of entries."""
    flat = x.reshape(-1).float()
    n = flat.numel()
    blocks = F.pad(flat, (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1) if n else blocks.new_empty(0)
    y = (blocks * absmax.clamp_min(1e-38).reciprocal()[:, None]).clamp(-1, 1)
    boundaries, order = search_tables(code)
    codes = order[torch.bucketize(y, boundaries).view(-1)[:n]]
    return codes, absmax


def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Twin of quantize.quantize_4bit."""
    codes, absmax = quantize_8bit(x, code, block_size)
    boundaries, order = search_tables(code)
    zero = order[torch.bucketize(boundaries.new_zeros(1), boundaries)]
    codes = torch.cat([codes, zero[: codes.numel() % 2]])
    return codes[0::2] << 4 | codes[1::2], absmax


def _dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, torch.empty(weight.shape, dtype=dtype, device=weight.packed.device))


def matmul(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    path: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Twin of matmul.matmul: dequantize, then multiply; y (..., N) in x's dtype.

    x: (..., K). weight: (N, K) in four bits. bias: (N,). path: h (..., r), up (N, r) and s, for
    s h up^T on top.
    """
    y = F.linear(x, _dense(weight, x.dtype), bias)
    return _add_path(y, path)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Twin of matmul.linear, x (..., K) -> (..., N): the gradient is autograd's."""
    return matmul(x, weight, bias)


def matmul_dx(
    dy: Tensor, weight: PackedWeight, path: tuple[Tensor, Tensor, float] | None = None
) -> Tensor:
    """Twin of matmul.matmul_dx: dy W, (..., N) -> (..., K), in dy's dtype.

    path: h (..., r), up (K, r) and s, for s h up^T on top.
    """
    return _add_path(dy @ _dense(weight, dy.dtype), path)


def _add_path(y: Tensor, path: tuple[Tensor, Tensor, float] | None) -> Tensor:
    if path is None:
        return y
    h, up, scaling = path
    added = torch.addmm(
        y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), up.to(y.dtype).t(), alpha=scaling
    )
    return added.view(y.shape)


def down(x: Tensor, A: Tensor, scaling: float = 1.0) -> Tensor:
    """Twin of lora.down."""
    return F.linear(x, A.to(x.dtype)) * scaling


def cross(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """Twin of lora.cross."""
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    return (left.float().t() @ right.float()) * scaling


def forward(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Twin of lora.forward."""
    h = down(x, A)
    return matmul(x, weight, bias, (h, B, scaling)), h


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: PackedWeight,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wants_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Twin of lora.backward."""
    dh = down(dy, B.t(), scaling)
    dx = matmul_dx(dy, weight, (dh, A.t(), 1.0)) if wants_dx else None
    return dx, cross(dh, x).to(A.dtype), cross(dy, h, scaling).to(B.dtype)


def lora_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """Twin of lora.lora_linear: the gradients are autograd's."""
    h = F.linear(x, A.to(x.dtype))
    y = F.linear(x, _dense(weight, x.dtype), bias)
    return y + (h @ B.to(x.dtype).t()) * scaling


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Twin of cross_entropy.cross_entropy, with all logits at once."""
    logits = F.linear(hidden, weight)
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    softmax_gradient(logits, targets, losses, gradient)
    return losses.sum(), logits @ weight if gradient else None


def softmax_gradient(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """Twin of cross_entropy.softmax_gradient."""
    counted = targets >= 0
    places = targets.clamp_min(0)[:, None]
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=1, keepdim=True)
    losses.copy_(torch.where(counted, (log_sum - wide.gather(1, places))[:, 0], 0.0))
    if gradient:
        p = (wide - log_sum).exp()
        p.scatter_add_(1, places, torch.full_like(log_sum, -1.0))
        logits.copy_(torch.where(counted[:, None], p, 0.0))


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: AdamWStep) -> Tensor:
    """One AdamW step in float32: m and v in place, the new parameter returned. torch's order."""
    p = p.float() * step.decay
    m.lerp_(g.float(), step.one_minus_beta1)
    v.mul_(step.beta2).addcmul_(g.float(), g.float(), value=step.one_minus_beta2)
    denominator = (v.sqrt() / step.root_correction2).add_(step.eps)
    return p.addcdiv_(m, denominator, value=-step.step_size)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[AdamWStep],
    factor: Tensor | None = None,
) -> None:
    """Twin of adamw.adamw."""
    if factor is not None:
        if not factor.isfinite():
            return
        grads = [g * factor for g in grads]
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        p.copy_(_update(p, g, m, v, step))


def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    m_codes: list[Tensor],
    m_absmaxes: list[Tensor],
    v_codes: list[Tensor],
    v_absmaxes: list[Tensor],
    steps: list[AdamWStep],
    signed_map: Tensor,
    unsigned_map: Tensor,
    block_size: int = 256,
    factor: Tensor | None = None,
) -> None:
    """Twin of adamw.adamw_8bit."""
    if factor is not None:
        if not factor.isfinite():
            return
        grads = [g * factor for g in grads]
    for p, g, mc, ms, vc, vs, step in zip(
        params, grads, m_codes, m_absmaxes, v_codes, v_absmaxes, steps, strict=True
    ):
        block = torch.arange(p.numel(), device=p.device) // block_size
        m = signed_map[mc.view(-1).int()] * ms[block]
        v = unsigned_map[vc.view(-1).int()] * vs[block]
        p.view(-1).copy_(_update(p.view(-1), g.view(-1), m, v, step))
        outgrown = g.view(-1).float().square() > v * step.outgrown
        codes, absmax = quantize_8bit(m, signed_map, block_size)
        mc.view(-1).copy_(codes)
        ms.copy_(absmax)
        codes, absmax = _quantize_positive(v, outgrown, unsigned_map, block_size)
        vc.view(-1).copy_(codes)
        vs.copy_(absmax)


def _quantize_positive(
    x: Tensor, round_up: Tensor, code: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Values >= 0 so that none but zero becomes zero; up instead of to the nearest where asked."""
    n = x.numel()
    blocks = F.pad(x, (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.amax(1) if n else blocks.new_empty(0)
    absmax = absmax.clamp_min(SMALLEST_POSITIVE_ABSMAX)
    y = (blocks * absmax.reciprocal()[:, None]).clamp(max=1).view(-1)[:n]
    codes = torch.bucketize(y, search_tables(code)[0])
    codes += (code[codes] < y) & round_up
    return torch.maximum(codes, (x > 0).long()).to(torch.uint8), absmax
