"""Quantizing and dequantizing on a CPU, lorax against bitsandbytes, interleaved in one process.

    python benchmarks/quantization.py           about two minutes

Dequantizing 4096 x 4096 into a given buffer against bitsandbytes.functional.dequantize_4bit as
called and against its bare AVX-512 kernel into a given buffer, to bfloat16 with the compiled
decoder too (LORAX_KERNELS=compiled); quantizing; and the forward pass of a frozen NF4 Linear of
that size at several numbers of rows, bitsandbytes' in training mode (in eval mode it repacks its
weight for another kernel). Every result is compared before it is timed.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as bf
import sides
import torch

import lorax
from lorax import backend as switch
from lorax.quant.linear import QuantizedLinear

SIZE = 4096
ROUNDS = 15
DTYPES = (torch.float32, torch.bfloat16)


def interleaved(**sides_: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides_}
    for _ in range(ROUNDS + 2):
        for name, call in sides_.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def bare_kernel(packed, state, out) -> Callable[[], None]:
    """bitsandbytes' C function itself, without its Python and without a fresh output."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[out.dtype]
    function = getattr(bnb.cextension.lib, f"cdequantize_blockwise_cpu_nf4_{name}")
    arguments = [bf.get_ptr(t) for t in (packed, state.absmax, out)]
    sizes = [ctypes.c_longlong(n) for n in (64, SIZE, SIZE)]
    return lambda: function(*arguments, *sizes)


def dequantizing(weight: torch.Tensor, backend: str = "auto") -> dict[str, float]:
    packed, state = bf.quantize_4bit(weight, quant_type="nf4")
    mine = lorax.quantize(weight, "nf4")
    out, other = torch.empty_like(weight), torch.empty_like(weight)
    bare = bare_kernel(packed, state, other)
    bare()
    with switch.backend(backend):
        assert torch.equal(mine.dequantize(out=out.zero_()), other)
        assert torch.equal(out, bf.dequantize_4bit(packed, state))
        return interleaved(
            lorax=lambda: mine.dequantize(out=out),
            bitsandbytes=lambda: bf.dequantize_4bit(packed, state),
            bare_kernel=bare,
        )


def quantizing(weight: torch.Tensor, double: bool) -> dict[str, float]:
    format = "nf4-dq" if double else "nf4"
    packed = bf.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)[0]
    assert torch.equal(lorax.quantize(weight, format).packed, packed.flatten())
    return interleaved(
        lorax=lambda: lorax.quantize(weight, format),
        bitsandbytes=lambda: bf.quantize_4bit(weight, quant_type="nf4", compress_statistics=double),
    )


def linear(weight: torch.Tensor, rows: int) -> dict[str, float]:
    """Two layers on each side, in turn: lorax keeps the weight that it decoded last."""
    mine = [QuantizedLinear(lorax.quantize(weight, "nf4")) for _ in range(2)]
    theirs = [linear4bit(weight) for _ in range(2)]
    x = torch.randn(rows, SIZE, dtype=weight.dtype, requires_grad=True)
    with torch.no_grad():
        a, b = mine[0](x).float(), theirs[0](x).float()
        assert (a - b).norm() <= 0.02 * b.norm(), (a - b).norm() / b.norm()
    next_mine, next_theirs = itertools.cycle(mine), itertools.cycle(theirs)
    return interleaved(lorax=lambda: next(next_mine)(x), bitsandbytes=lambda: next(next_theirs)(x))


def linear4bit(weight: torch.Tensor) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        SIZE, SIZE, bias=False, quant_type="nf4", compress_statistics=False,
        compute_dtype=weight.dtype,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return layer.to("cpu").train()


def main() -> None:
    results: dict[str, dict[str, float]] = {}

    def report(name: str, times: dict[str, float]) -> None:
        ratio = times["bitsandbytes"] / times["lorax"]
        results[name] = {**{f"{k}_seconds": v for k, v in times.items()}, "times_as_fast": ratio}
        bare = times.get("bare_kernel")
        if bare is not None:
            results[name]["times_the_bare_kernel"] = times["lorax"] / bare
        print(
            f"{name:36} lorax {1e3 * times['lorax']:7.2f} ms  bitsandbytes "
            f"{1e3 * times['bitsandbytes']:7.2f} ms  {ratio:5.2f} times as fast"
            + (f"  (bare kernel {1e3 * bare:.2f} ms)" if bare is not None else ""),
            flush=True,
        )

    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
        report(f"dequantize {name}", dequantizing(weight))
        if dtype == torch.bfloat16:
            report(f"dequantize {name}, compiled", dequantizing(weight, "compiled"))
        for double in (False, True):
            report(f"quantize {'nf4-dq' if double else 'nf4'} {name}", quantizing(weight, double))
        for rows in (1, 16, 64, 512):
            report(f"linear {name} M = {rows}", linear(weight, rows))
    content = {"machine": sides.machine("torch", "bitsandbytes"), "size": SIZE, "cases": results}
    print(sides.write_results("quantization-cpu", content))


if __name__ == "__main__":
    main()
