"""The GPU suite's kernels: timed at Llama-3-8B's shapes, each with a check of its output.

Shares are taken against what this GPU reaches in the same process, a large copy and a large
product, not against a data sheet. bitsandbytes stands beside where it can be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_timer import Timer, ceilings, checked
from torch import Tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 16, 64, 128, 2048)
RANK = 16
Row = dict[str, Any]


def make_weight(N: int, K: int, device: str) -> Any:
    """A random NF4 weight with double quantization, quantized on the device."""
    from lorax.backend import kernels_for
    from lorax.kernels.weight import PackedWeight
    from lorax.quant import codebooks
    from lorax.quant.dynamic_map import dynamic_map

    code, dynamic = codebooks.four_bit("nf4", device), dynamic_map(True, device)
    source = torch.randn(N, K, device=device)
    kernels = kernels_for(source, "quantize")
    packed, absmax = kernels.quantize_4bit(source, code, 64)
    offset = absmax.mean()
    codes, second = kernels.quantize_8bit(absmax - offset, dynamic, 256)
    return PackedWeight(packed, codes, code, (N, K), 64, second, dynamic, offset)


def dense(weight: Any, dtype: torch.dtype) -> Tensor:
    from lorax.kernels import reference

    return reference.dequantize(
        weight, torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    )


def bitsandbytes_weights(N: int, K: int, count: int) -> Any:
    """bitsandbytes' module and weights of its own, or None where it cannot be used."""
    if not torch.cuda.is_available():
        return None
    try:
        import bitsandbytes as bnb

        made = [
            bnb.functional.quantize_4bit(
                torch.randn(N, K, device="cuda").bfloat16(),
                quant_type="nf4",
                blocksize=64,
                compress_statistics=True,
            )
            for _ in range(count)
        ]
    except Exception as error:  # an optional rival may fail in its own ways
        print(f"bitsandbytes is not timed: {error!r}")
        return None
    return bnb, made


def with_shares(row: Row, times: Row, moved: int, operations: int, limits: Row) -> Row:
    """The row with, for lorax, the share of this GPU's bandwidth and bf16 rate, and the rivals'."""
    seconds = 1e-6 * times["lorax"]["cold"]["median_us"]
    row |= {
        "times": times,
        "share_of_bandwidth": round(moved / seconds / limits["bytes_a_second"], 3),
        "share_of_bf16": round(operations / seconds / limits["bf16_operations_a_second"], 3),
    }
    for rival in ("torch bf16", "bitsandbytes"):
        if rival in times:
            ratio = times[rival]["cold"]["median_us"] / times["lorax"]["cold"]["median_us"]
            row[f"times as fast as {rival}"] = round(ratio, 3)
    return row


def time_dequantize(timer: Timer, limits: Row, tiny: bool) -> Iterator[Row]:
    from lorax.backend import kernels_for

    for N, K in [(64, 128)] if tiny else SHAPES:
        weights = [make_weight(N, K, timer.device) for _ in range(2 if tiny else 10)]
        out = torch.empty(N, K, dtype=torch.bfloat16, device=timer.device)
        decode = kernels_for(out, "dequantize").dequantize
        decode(weights[0], out)
        equal = torch.equal(out, dense(weights[0], torch.bfloat16))
        row = {"N": N, "K": K, "check": {"equal": equal, "ok": equal}}
        if not equal:
            yield row
            continue
        sides: Any = {"lorax": [partial(decode, w, out) for w in weights]}
        if rival := bitsandbytes_weights(N, K, len(weights)):
            bnb, made = rival
            sides["bitsandbytes"] = [partial(bnb.functional.dequantize_4bit, *w) for w in made]
        moved = weights[0].packed.nbytes + weights[0].absmax.nbytes + out.nbytes
        yield with_shares(row, timer.compare(sides), moved, 0, limits)


def time_products(timer: Timer, limits: Row, tiny: bool) -> Iterator[Row]:
    """y = x W^T and dx = dy W, from one row to a training step's."""
    from lorax.backend import kernels_for

    for N, K in [(64, 128)] if tiny else SHAPES:
        count = 2 if tiny else 20
        weights = [make_weight(N, K, timer.device) for _ in range(count)]
        rival = bitsandbytes_weights(N, K, count)
        plain = [dense(w, torch.bfloat16) for w in weights[: 2 if tiny else 8]]
        for M in (1, 3) if tiny else ROWS:
            x = torch.randn(M, K, device=timer.device).bfloat16()
            dy = torch.randn(M, N, device=timer.device).bfloat16()
            kernels, W = kernels_for(x, "matmul"), plain[0]
            checks = {
                "y": checked(
                    kernels.matmul(x, weights[0]), x @ W.t(), x.float() @ dense32(weights[0]).t()
                ),
                "dx": checked(
                    kernels.matmul_dx(dy, weights[0]), dy @ W, dy.float() @ dense32(weights[0])
                ),
            }
            row = {"N": N, "K": K, "M": M, "check": checks}
            if not all(check["ok"] for check in checks.values()):
                yield row
                continue
            some = weights if M <= 128 else weights[:4]
            sides: Any = {
                "torch bf16": [partial(torch.nn.functional.linear, x, w) for w in plain],
                "lorax": [partial(kernels.matmul, x, w) for w in some],
                "lorax dx": [partial(kernels.matmul_dx, dy, w) for w in some],
            }
            if rival:
                bnb, made = rival
                sides["bitsandbytes"] = [
                    partial(bnb.matmul_4bit, x, p.t(), quant_state=state) for p, state in made
                ]
            moved = weights[0].packed.nbytes + weights[0].absmax.nbytes + 2 * M * (N + K)
            times = timer.compare(sides, 20 if M <= 128 else 8)
            yield with_shares(row, times, moved, 2 * M * N * K, limits)


def dense32(weight: Any) -> Tensor:
    return dense(weight, torch.float32)


def time_step_kernels(timer: Timer, limits: Row, tiny: bool) -> Iterator[Row]:
    """The element-wise kernels of a layer, against their twins on the device; bytes a second."""
    from lorax.kernels import reference_step

    if timer.device == "cuda":
        from lorax.kernels import step
    else:
        step = reference_step  # the interpreter is for tests
    M, C, inner = (4, 64, 128) if tiny else (2048, 4096, 14336)

    def rows(width: int) -> Tensor:
        return torch.randn(M, width, device=timer.device).bfloat16()

    x, delta, dy, both, da = rows(C), rows(C), rows(C), rows(2 * inner), rows(inner)
    weight = torch.ones(C, device=timer.device).bfloat16()
    total, _, scale = reference_step.norm(x, weight, 1e-5, delta)
    wide = M * C * 2
    cases: list[tuple[str, Callable[[Any], Any], int]] = [
        ("norm", lambda side: side.norm(x, weight, 1e-5, delta)[1], 4 * wide),
        (
            "norm backward",
            lambda side: side.norm_backward(dy, total, weight, scale, delta),
            4 * wide,
        ),
        ("swiglu", lambda side: side.swiglu(both), 3 * M * inner * 2),
        ("swiglu backward", lambda side: side.swiglu_backward(da, both)[0], 6 * M * inner * 2),
    ]
    for name, call, moved in cases:
        found, twin = call(step).float(), call(reference_step).float()
        error = float((found - twin).norm() / twin.norm())
        row = {"name": name, "check": {"error": error, "ok": error < 2**-8}}
        if row["check"]["ok"]:
            times = timer.compare({"lorax": [partial(call, step)] * 4})
            row = with_shares(row, times, moved, 0, limits)
        yield row


def time_loss(timer: Timer, tiny: bool) -> Iterator[Row]:
    """Cross entropy behind a Llama-3 head with dX, beside F.cross_entropy, compiled too."""
    from lorax.backend import kernels_for

    M, C, V = (4, 32, 64) if tiny else (2048, 4096, 128256)
    head = torch.randn(V, C, device=timer.device).mul_(C**-0.5).bfloat16()
    x = torch.randn(M, C, device=timer.device).bfloat16()
    targets = torch.randint(V, (M,), device=timer.device)
    kernels = kernels_for(x, "cross_entropy")

    def plain() -> tuple[Tensor, Tensor]:
        rows = x.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(rows @ head.t(), targets, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, rows)[0]

    loss, dx = kernels.cross_entropy(x, head, targets)
    expected, gradient = plain()
    error = float((dx.float() - gradient.float()).norm() / gradient.float().norm())
    good = abs(float(loss / expected) - 1) < 1e-2 and error < 3e-2
    row: Row = {"name": "cross entropy with dX", "check": {"error": error, "ok": good}}
    if good:
        sides: Any = {"lorax": [partial(kernels.cross_entropy, x, head, targets)], "torch": [plain]}
        row["times"] = timer.compare(sides, 5)
    yield row


def parts(name: str, device: str, tiny: bool) -> Iterator[tuple[str, Any]]:
    """(key, value) of the report, as they are measured; lists grow row by row."""
    timer = Timer(device)
    limits = ceilings(timer, tiny)
    yield "ceilings", limits
    made: dict[str, Callable[[], Iterator[Row]]] = {
        "dequantize": lambda: time_dequantize(timer, limits, tiny),
        "products": lambda: time_products(timer, limits, tiny),
        "step_kernels": lambda: time_step_kernels(timer, limits, tiny),
        "loss": lambda: time_loss(timer, tiny),
    }
    for row in made[name]():
        yield name, row
