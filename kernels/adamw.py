"""AdamW over all adapter tensors in one launch, with 32-bit or 8-bit states.

A LoRA model has hundreds of small tensors; a launch each would cost more than the arithmetic. So
one kernel gets a table of addresses, and each program finds its tensor in it:

    owner  (programs,)   int32   which tensor a program works on
    table  (tensors, k)  int64   addresses of p, g and the states; size; the tensor's first program
    steps  (tensors, 8)  float32 what the step multiplies with: every tensor may have its own rate

Per value and step, in float32, in torch.optim.AdamW's order:

    p <- p (1 - lr wd)
    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + (1 - beta2) g g
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The second line is torch.lerp, the third torch.addcmul; on a CPU the last multiplication and the
addition of both are one fused operation, rounded once, and so they are here. Everything else is
rounded operation by operation, there and here. So the moments' bits are those of
torch.optim.AdamW(foreach=False) on a CPU. The parameters' are, too, but for its square root: MKL's
is one ulp off for a fifth of all numbers, and the kernel's is rounded right.

**Clipping** is a factor for all gradients, min(1, most / (norm + 1e-6)), which stands in the
device's memory: the kernel reads it, so the host never waits for a norm and the gradients are not
written back. Where the norm is no finite number the factor is none either, and the step changes
nothing.

**8-bit states** (Dettmers et al., arXiv:2110.02861): m and v are kept as codes of a dynamic map,
with one float32 scale for each block of 256 values: 2.03 bytes a parameter. The step uses the new m
and v before they are rounded. m takes the nearest codes; v takes them under three rules, for which
lorax/optim/adamw8bit.py has the reasons: where it is not zero, its code is not zero; where g^2
exceeds 16 v, it is rounded up; its scale is at least 1e-30.

Cost: 28 bytes a value with 32-bit states, 16 with 8-bit ones (float32 p and g).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lorax.kernels.common import nearest_code, scaled_to_absmax
from lorax.kernels.hyper import AdamWStep
from lorax.kernels.launch import launch
from lorax.kernels.reference import SMALLEST_POSITIVE_ABSMAX, search_tables

TILE = 1024  # values a program
_boundaries = WeakIdKeyDictionary()  # of the maps that have been used


@triton.jit
def _address(table, entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that an entry of the table holds; ALIGNED promises 16 bytes."""
    address = tl.load(table + entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _size(table, entry, factor, ALIGNED: tl.constexpr):
    """How many of a tensor's values are stepped: none where the factor is no finite number.

    ALIGNED promises a multiple of 16.
    """
    size = tl.load(table + entry)
    if factor is not None:
        value = tl.load(factor)
        size = tl.where(value - value == 0.0, size, 0)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def _stepped(p, g, m, v, steps):
    """One step for values p, g, m, v in float32: the new p, m and v."""
    decay = tl.load(steps)
    one_minus_beta1 = tl.load(steps + 1)
    beta2 = tl.load(steps + 2)
    one_minus_beta2 = tl.load(steps + 3)
    root_correction2 = tl.load(steps + 4)
    eps = tl.load(steps + 5)
    step_size = tl.load(steps + 6)
    p = p * decay
    near = one_minus_beta1 < 0.5  # torch.lerp: from the nearer end, rounded once
    weight = tl.where(near, one_minus_beta1, one_minus_beta1 - 1.0)
    m = tl.fma(tl.zeros_like(g) + weight, g - m, tl.where(near, m, g))
    v = tl.fma(one_minus_beta2 * g, g, v * beta2)  # torch.addcmul: the sum rounded once
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root_correction2) + eps
    p = p + tl.div_rn(-step_size * m, denominator)
    return p, m, v


@triton.jit
def _gradient(at, inside, factor):
    """A tile of gradients in float32, multiplied by `factor` and rounded, as `mul_` rounds."""
    g = tl.load(at, mask=inside, other=0.0)
    if factor is not None:
        g = (g.to(tl.float32) * tl.load(factor)).to(g.dtype)
    return g.to(tl.float32)


@triton.jit
def _adamw_kernel(
    owner,
    table,
    steps,
    factor,
    P_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(owner + program).to(tl.int64)
    table += tensor * 6
    size = _size(table, 4, factor, ALIGNED)
    place = (program - tl.load(table + 5)) * TILE + tl.arange(0, TILE)
    inside = place < size
    p_at = _address(table, 0, P_DTYPE, ALIGNED) + place
    m_at = _address(table, 2, tl.float32, ALIGNED) + place
    v_at = _address(table, 3, tl.float32, ALIGNED) + place
    g = _gradient(_address(table, 1, P_DTYPE, ALIGNED) + place, inside, factor)
    p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    p, m, v = _stepped(p, g, m, v, steps + tensor * 8)
    tl.store(p_at, p.to(P_DTYPE), mask=inside)
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)


@triton.jit
def _adamw_8bit_kernel(
    owner,
    table,
    steps,
    signed_map,
    signed_boundaries,
    unsigned_map,
    unsigned_boundaries,
    factor,
    P_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SMALLEST_V_SCALE: tl.constexpr,
):
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    program = tl.program_id(0)
    tensor = tl.load(owner + program).to(tl.int64)
    table += tensor * 8
    size = _size(table, 6, factor, ALIGNED)
    block = (program - tl.load(table + 7)) * BLOCKS + tl.arange(0, BLOCKS)
    present = block * BLOCK_SIZE < size
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = place < size
    p_at = _address(table, 0, P_DTYPE, ALIGNED) + place
    m_at = _address(table, 2, tl.uint8, ALIGNED) + place
    m_scale_at = _address(table, 3, tl.float32, ALIGNED) + block
    v_at = _address(table, 4, tl.uint8, ALIGNED) + place
    v_scale_at = _address(table, 5, tl.float32, ALIGNED) + block
    g = _gradient(_address(table, 1, P_DTYPE, ALIGNED) + place, inside, factor)
    p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(signed_map + tl.load(m_at, mask=inside, other=0).to(tl.int32))
    v = tl.load(unsigned_map + tl.load(v_at, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(m_scale_at, mask=present, other=0.0)[:, None]
    v = v * tl.load(v_scale_at, mask=present, other=0.0)[:, None]
    p, m, v = _stepped(p, g, m, v, steps + tensor * 8)
    tl.store(p_at, p.to(P_DTYPE), mask=inside)
    m_scale, y = scaled_to_absmax(tl.where(inside, m, 0.0), inside, 1)
    tl.store(m_at, nearest_code(y, signed_boundaries, 8).to(tl.uint8), mask=inside)
    tl.store(m_scale_at, m_scale, mask=present)
    v_scale, y = scaled_to_absmax(tl.where(inside, v, 0.0), inside, 1, SMALLEST_V_SCALE)
    code = nearest_code(y, unsigned_boundaries, 8)
    outgrown = g * g > v * tl.load(steps + tensor * 8 + 7)
    code += (outgrown & (tl.load(unsigned_map + code) < y)).to(tl.int32)
    code = tl.where((v > 0.0) & (code == 0), 1, code)
    tl.store(v_at, code.to(tl.uint8), mask=inside)
    tl.store(v_scale_at, v_scale, mask=present)


def _tables(
    tensors: Sequence[Sequence[Tensor]], steps: Sequence[AdamWStep], tile: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """owner, table and steps for columns of tensors, p first; one copy to the device each.

    The last is whether all addresses and sizes are multiples of 16: then loads are 16 bytes wide.
    """
    device = tensors[0][0].device
    sizes = [p.numel() for p in tensors[0]]
    programs = [-(-size // tile) for size in sizes]  # triton.cdiv takes 10 us a call
    firsts = list(accumulate(programs, initial=0))[:-1]
    owner = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    columns = [[tensor.data_ptr() for tensor in column] for column in tensors]
    table = torch.tensor([*columns, sizes, firsts], dtype=torch.int64).t().contiguous()
    numbers = torch.tensor(steps, dtype=torch.float64).float()
    aligned = all(number % 16 == 0 for column in (*columns, sizes) for number in column)
    return _to(owner, device), _to(table, device), _to(numbers, device), aligned


def _boundaries_of(values: Tensor) -> Tensor:
    """A map's boundaries, worked out once: a step must not sort it again."""
    if values not in _boundaries:
        _boundaries[values] = search_tables(values)[0]
    found: Tensor = _boundaries[values]
    return found


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _check(params: Sequence[Tensor], grads: Sequence[Tensor], *states: Sequence[Tensor]) -> None:
    """Addresses carry no dtype and no stride, so both are looked at here."""
    for column in (params, grads, *states):
        if len(column) != len(params):
            raise ValueError(f"{len(column)} tensors beside {len(params)} parameters")
        for tensor in column:
            if not tensor.is_contiguous() or tensor.device != params[0].device:
                raise ValueError(
                    f"a tensor on {tensor.device} with strides {tensor.stride()}; expected "
                    f"contiguous ones on {params[0].device}"
                )
    for p, g in zip(params, grads, strict=True):
        if p.dtype != params[0].dtype or g.dtype != p.dtype or g.shape != p.shape:
            raise ValueError(
                f"a parameter {tuple(p.shape)} {p.dtype} with a gradient {tuple(g.shape)} "
                f"{g.dtype}; expected one shape, and one dtype for all: {params[0].dtype}"
            )


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[AdamWStep],
    factor: Tensor | None = None,
) -> None:
    """One AdamW step for all tensors, in place, in one launch.

    Args:
        params: contiguous, all of one dtype and on one device.
        grads: of the same shapes and dtype.
        exp_avgs: float32, of the same sizes.
        exp_avg_sqs: the same.
        steps: one a tensor.
        factor: () float32 on the device, what each gradient is multiplied by first, or None. If it
            is no finite number, nothing is changed.
    """
    if not params:
        return
    _check(params, grads, exp_avgs, exp_avg_sqs)
    owner, table, numbers, aligned = _tables((params, grads, exp_avgs, exp_avg_sqs), steps, TILE)
    launch(
        _adamw_kernel,
        (owner.numel(),),
        owner,
        table,
        numbers,
        factor,
        P_DTYPE=_DTYPES[params[0].dtype],
        ALIGNED=aligned,
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )


def adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m_codes: Sequence[Tensor],
    m_absmaxes: Sequence[Tensor],
    v_codes: Sequence[Tensor],
    v_absmaxes: Sequence[Tensor],
    steps: Sequence[AdamWStep],
    signed_map: Tensor,
    unsigned_map: Tensor,
    block_size: int = 256,
    factor: Tensor | None = None,
) -> None:
    """One AdamW step with 8-bit states for all tensors, in place, in one launch.

    Args:
        params: contiguous, all of one dtype and on one device.
        grads: of the same shapes and dtype.
        m_codes: uint8, of the same sizes, codes of signed_map.
        m_absmaxes: (ceil(n / block_size),) float32.
        v_codes: uint8, codes of unsigned_map.
        v_absmaxes: as m's.
        steps: one a tensor.
        signed_map: (256,) float32, ascending.
        unsigned_map: (256,) float32, ascending from zero.
        block_size: values that share a scale, a power of two.
        factor: as in `adamw`.
    """
    if not params:
        return
    states = (m_codes, m_absmaxes, v_codes, v_absmaxes)
    _check(params, grads, *states)
    tile = max(TILE, block_size)
    owner, table, numbers, aligned = _tables((params, grads, *states), steps, tile)
    launch(
        _adamw_8bit_kernel,
        (owner.numel(),),
        owner,
        table,
        numbers,
        signed_map,
        _boundaries_of(signed_map),
        unsigned_map,
        _boundaries_of(unsigned_map),
        factor,
        P_DTYPE=_DTYPES[params[0].dtype],
        ALIGNED=aligned,
        TILE=tile,
        BLOCK_SIZE=block_size,
        SMALLEST_V_SCALE=SMALLEST_POSITIVE_ABSMAX,
        num_warps=8,  # 4 warps spill registers on sm_80 under Triton 3.6
        enable_fp_fusion=False,
    )
