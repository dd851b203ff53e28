"""The operators on four-bit weights, registered with torch.library.

Each takes plain tensors, so that torch.compile can trace through it (every operator has a fake
twin that gives shapes and dtypes) and so that the same call runs anywhere:

    tensors on a CPU     plain PyTorch, lorax.kernels.reference
    tensors on CUDA      Triton, lorax.kernels

One switch forces either: `with backend("pytorch"):`, or LORAX_KERNELS=pytorch | triton | auto in
the environment. Triton is imported when the first operator needs it, never earlier. "compiled" is
"auto" with the decoder on a CPU compiled (lorax/quant/compiled.py).

A weight is given as `packed, absmax, code, shape, block_size` and, with double quantization,
`nested_absmax, nested_map, nested_offset`: the fields of lorax.kernels.weight.PackedWeight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorax.errors import EnvironmentProblem, UsageError
from lorax.kernels.hyper import AdamWStep
from lorax.kernels.weight import PackedWeight

BACKENDS = ("auto", "pytorch", "triton", "compiled")
_forced: ContextVar[str | None] = ContextVar("lorax_kernels", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, every operator runs in "pytorch", in "triton", or ("auto") by its tensors' device.

    "compiled" is "auto" with the CPU's decoder compiled, which takes seconds the first time.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; expected one of {BACKENDS}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the operators run in Triton for this tensor: on CUDA, or where that is forced."""
    name = _chosen()
    if name in ("auto", "compiled"):
        return tensor.is_cuda
    if name == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise EnvironmentProblem(
            f"Triton kernels were asked for, but the tensors are on {tensor.device}; "
            "move them to CUDA, or set TRITON_INTERPRET=1 before Python starts"
        )
    return name == "triton"


def uses_compiled(tensor: Tensor) -> bool:
    """Whether this tensor is decoded into by the compiled decoder: on a CPU, where asked for."""
    return _chosen() == "compiled" and tensor.device.type == "cpu"


def _chosen() -> str:
    name = _forced.get() or os.environ.get("LORAX_KERNELS", "auto")
    if name not in BACKENDS:
        raise UsageError(f"LORAX_KERNELS={name!r} is unknown; expected one of {BACKENDS}")
    return name


def _module(name: str, tensor: Tensor) -> ModuleType:
    """lorax.kernels.`name`, or its twin in plain PyTorch."""
    return import_module(f"lorax.kernels.{name if uses_triton(tensor) else 'reference'}")


@torch.library.custom_op("lorax::dequantize_4bit", mutates_args=())
def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block_size: int,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight in `dtype`, of `shape`: code * absmax in float32, rounded once."""
    weight = PackedWeight(
        packed, absmax, code, tuple(shape), block_size, nested_absmax, nested_map, nested_offset
    )
    out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    result: Tensor = _module("dequantize", packed).dequantize(weight, out)
    return result


@dequantize_4bit.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block_size: int,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    nested_offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def dequantize_4bit_into(weight: PackedWeight, out: Tensor) -> Tensor:
    """The same into a buffer that is there: `out`, contiguous, of the weight's shape."""
    result: Tensor = _module("dequantize", out).dequantize(weight, out)
    return result


def _quantized(x: Tensor, block_size: int, codes: int) -> tuple[Tensor, Tensor]:
    blocks = (x.numel() + block_size - 1) // block_size
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


@torch.library.custom_op("lorax::quantize_4bit", mutates_args=())
def quantize_4bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """packed (ceil(n / 2),) uint8 and absmax (blocks,) float32; see lorax.kernels.quantize."""
    packed, absmax = _module("quantize", x).quantize_4bit(x, code, block_size)
    return packed, absmax


@quantize_4bit.register_fake
def _(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _quantized(x, block_size, (x.numel() + 1) // 2)


@torch.library.custom_op("lorax::quantize_8bit", mutates_args=())
def quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """codes (n,) uint8 and absmax (blocks,) float32; see lorax.kernels.quantize."""
    codes, absmax = _module("quantize", x).quantize_8bit(x, code, block_size)
    return codes, absmax


@quantize_8bit.register_fake
def _(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _quantized(x, block_size, x.numel())


@torch.library.custom_op("lorax::matmul_4bit", mutates_args=())
def matmul_4bit(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block_size: int,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b: (..., K) -> (..., N). The gradient goes to x alone."""
    weight = PackedWeight(
        packed, absmax, code, tuple(shape), block_size, nested_absmax, nested_map, nested_offset
    )
    y: Tensor = _module("matmul", x).matmul(x, weight, bias)
    return y


@matmul_4bit.register_fake
def _(x: Tensor, bias: Tensor | None, packed: Tensor, *weight: Any, **nested: Any) -> Tensor:
    shape = weight[2] if len(weight) > 2 else nested["shape"]
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("lorax::matmul_4bit_dx", mutates_args=())
def matmul_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block_size: int,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """dx = dy W: (..., N) -> (..., K)."""
    weight = PackedWeight(
        packed, absmax, code, tuple(shape), block_size, nested_absmax, nested_map, nested_offset
    )
    dx: Tensor = _module("matmul", dy).matmul_dx(dy, weight)
    return dx


@matmul_4bit_dx.register_fake
def _(dy: Tensor, packed: Tensor, *weight: Any, **nested: Any) -> Tensor:
    shape = weight[2] if len(weight) > 2 else nested["shape"]
    return dy.new_empty(*dy.shape[:-1], shape[1])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.weight = inputs[2:]


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return matmul_4bit_dx(dy, *ctx.weight), *[None] * (1 + len(ctx.weight))


matmul_4bit.register_autograd(_matmul_backward, setup_context=_keep_weight)


@torch.library.custom_op("lorax::lora_linear_4bit", mutates_args=())
def _lora_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block_size: int,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    weight = PackedWeight(
        packed, absmax, code, tuple(shape), block_size, nested_absmax, nested_map, nested_offset
    )
    y, h = _module("lora", x).forward(x, weight, bias, A, B, scaling)
    return y, h


@_lora_linear.register_fake
def _(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, *weight: Any, **nested: Any
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty(*leading, B.shape[0]), x.new_empty(*leading, A.shape[0])


@torch.library.custom_op("lorax::lora_linear_4bit_backward", mutates_args=())
def _lora_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block_size: int,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = PackedWeight(
        packed, absmax, code, tuple(shape), block_size, nested_absmax, nested_map, nested_offset
    )
    dx, dA, dB = _module("lora", dy).backward(dy, x, h, weight, A, B, scaling)
    return dx, dA, dB


@_lora_backward.register_fake
def _(
    dy: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, *rest: Any, **nested: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(A), torch.empty_like(B)


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, ctx.scaling = inputs[:4]
    ctx.weight = inputs[5:]
    ctx.save_for_backward(x, output[1], A, B)


def _lora_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, h, A, B = ctx.saved_tensors
    gradients = _lora_backward(dy, x, h, A, B, ctx.scaling, *ctx.weight)
    return *gradients, *[None] * (2 + len(ctx.weight))


_lora_linear.register_autograd(_lora_gradients, setup_context=_keep_lora)


def lora_linear_4bit(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None, *weight: Any
) -> Tensor:
    """y = x W^T + b + scaling * (x A^T) B^T, with gradients for x, A and B.

    x (..., K); A (r, K) and B (N, r), of any floating dtype; weight as in `matmul_4bit`.
    """
    y: Tensor = _lora_linear(x, A, B, scaling, bias, *weight)[0]
    return y


@torch.library.custom_op("lorax::cross_entropy_frozen_head", mutates_args=())
def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    loss, dx = _module("cross_entropy", hidden).cross_entropy(hidden, weight, targets, gradient)
    return loss, hidden.new_empty(0) if dx is None else dx


@_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    dx = hidden.new_empty(hidden.shape if gradient else 0)
    return hidden.new_empty((), dtype=torch.float32), dx


def _keep_dx(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _scale_dx(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Any, ...]:
    (dx,) = ctx.saved_tensors
    return dx * dloss, None, None, None  # a 0-d factor keeps the gradient's dtype


_cross_entropy.register_autograd(_scale_dx, setup_context=_keep_dx)


def cross_entropy_frozen_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of hidden (N, C) behind a frozen head (V, C): () float32.

    targets: (N,) int64, a negative one counts nothing. dX is computed together with the loss.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    loss: Tensor = _cross_entropy(hidden, weight, targets, wants_gradient)[0]
    return loss


@torch.library.custom_op("lorax::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[float],
) -> None:
    """One AdamW step for all tensors, in place; on CUDA in one launch.

    steps: the eight numbers of lorax.kernels.hyper.AdamWStep, tensor after tensor.
    """
    if params:
        numbers = _steps(steps, len(params))
        _module("adamw", params[0]).adamw(params, grads, exp_avgs, exp_avg_sqs, numbers)


@torch.library.custom_op(
    "lorax::adamw_8bit_",
    mutates_args=("params", "m_codes", "m_absmaxes", "v_codes", "v_absmaxes"),
)
def adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m_codes: Sequence[Tensor],
    m_absmaxes: Sequence[Tensor],
    v_codes: Sequence[Tensor],
    v_absmaxes: Sequence[Tensor],
    steps: Sequence[float],
    signed_map: Tensor,
    unsigned_map: Tensor,
    block_size: int = 256,
) -> None:
    """The same with 8-bit states; see lorax.kernels.adamw."""
    if params:
        numbers = _steps(steps, len(params))
        states = (m_codes, m_absmaxes, v_codes, v_absmaxes)
        _module("adamw", params[0]).adamw_8bit(
            params, grads, *states, numbers, signed_map, unsigned_map, block_size
        )


def _steps(numbers: Sequence[float], count: int) -> list[AdamWStep]:
    width = len(AdamWStep._fields)
    if len(numbers) != width * count:
        raise UsageError(f"steps: {len(numbers)} numbers; expected {width} for each of {count}")
    return [AdamWStep(*numbers[at : at + width]) for at in range(0, len(numbers), width)]
