"""A step of each optimizer over a LoRA's tensors, beside torch's and bitsandbytes' (gpu_suite.py).

Timed by the host's clock, interleaved step by step: gathering 450 addresses is part of what a step
costs. "step" is until the stream that trains is free again, "settled" until pages that go back to
the host have arrived, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

RANK = 16


def optimizer_sides() -> dict[str, Callable[[list[torch.nn.Parameter]], Any]]:
    """Each optimizer by its name; bitsandbytes' where it can be imported.

    bitsandbytes pages no tensor of less than 100,000 elements, so none of 16 x 4096.
    """
    from lorax import optim

    sides: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
        "torch AdamW fused": partial(torch.optim.AdamW, fused=True),
        "torch AdamW foreach=False": partial(torch.optim.AdamW, foreach=False),
        "lorax AdamW": optim.AdamW,
        "lorax AdamW fused=False": partial(optim.AdamW, fused=False),
        "lorax AdamW8bit": optim.AdamW8bit,
        "lorax PagedAdamW": optim.PagedAdamW,
        "lorax PagedAdamW8bit": optim.PagedAdamW8bit,
    }
    try:
        import bitsandbytes.optim
    except Exception as error:  # an optional rival may fail in its own ways
        print(f"bitsandbytes is not timed: {error!r}")
        return sides
    for kind in ("AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit"):
        sides[f"bitsandbytes {kind}"] = getattr(bitsandbytes.optim, kind)
    return sides


def time_optimizers(
    device: str = "cuda", tensors: int = 450, width: int = 4096, repeats: int = 30
) -> list[dict[str, Any]]:
    """A step of each optimizer over a LoRA's tensors (r, width), float32, one after the other."""
    grads = [torch.randn(RANK, width, device=device) for _ in range(tensors)]
    optimizers: dict[str, Any] = {}
    for name, make in optimizer_sides().items():
        params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        try:
            optimizer = make(params)
            for _ in range(3):
                optimizer.step()
        except Exception as error:  # no cuda-bindings for paging, a rival without this GPU
            print(f"{name} is not timed: {error!r}")
            continue
        optimizers[name] = optimizer
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            times[name].append(timed_step(optimizer, device))
    parameters = sum(grad.numel() for grad in grads)
    return [
        optimizer_row(name, optimizer, times[name], parameters)
        for name, optimizer in optimizers.items()
    ]


def timed_step(optimizer: Any, device: str) -> tuple[float, float]:
    """Microseconds of a step until the current stream, and until the whole device is done."""
    wait = torch.cuda.synchronize if device == "cuda" else bool
    main = torch.cuda.current_stream().synchronize if device == "cuda" else bool
    wait()
    begin = time.perf_counter()
    optimizer.step()
    main()
    done = time.perf_counter()
    wait()
    return 1e6 * (done - begin), 1e6 * (time.perf_counter() - begin)


def optimizer_row(
    name: str, optimizer: Any, times: list[tuple[float, float]], parameters: int
) -> dict[str, Any]:
    steps, settled = zip(*times, strict=True)
    fifths = quantiles(steps, n=5, method="inclusive")
    if hasattr(optimizer, "state_bytes"):
        held = optimizer.state_bytes()
    else:  # without the maps that bitsandbytes shares between its tensors
        held = sum(
            value.nbytes
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
        )
    row = {
        "name": name,
        "median_us": round(median(steps), 1),
        "p20_us": round(fifths[0], 1),
        "p80_us": round(fifths[3], 1),
        "settled_median_us": round(median(settled), 1),
        "state_bytes_per_parameter": round(held / parameters, 3),
    }
    if hasattr(optimizer, "paging"):
        row["paging"] = vars(optimizer.paging)
    return row


def optimizer_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The optimizers' table, in Markdown; nothing where they were not timed."""
    if not rows:
        return []
    (fused,) = (row["median_us"] for row in rows if row["name"] == "torch AdamW fused")
    lines = [
        "",
        "A step over 450 LoRA tensors of 16 x 4096, float32, host included; settled: with the "
        "pages back on the host.",
        "",
        "| optimizer | step, us | p20-p80 | settled, us | of torch fused | state bytes a value |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['median_us']} | {row['p20_us']}-{row['p80_us']} | "
            f"{row['settled_median_us']} | {row['median_us'] / fused:.2f} | "
            f"{row['state_bytes_per_parameter']} |"
        )
    return lines
