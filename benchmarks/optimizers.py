"""Step time and state bytes of lorax's four optimizers against torch's and bitsandbytes'.

    python benchmarks/optimizers.py [--rounds 15] [--threads N]

SmolLM2-135M's LoRA at r = 16 on all linears: 420 tensors, 4.9 million parameters, float32. All
sides step in one process, interleaved (one step each a round), and the median counts. bitsandbytes
pages nothing on a CPU and says so; its paged optimizers are then its plain ones. Before anything is
timed, AdamW and PagedAdamW must be bit-equal to torch's foreach=False; else nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit

LAYERS, RANK = 30, 16
LINEARS = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
RESULT = Path(__file__).parent / "results" / "optimizers-cpu.json"
Optimizer = torch.optim.Optimizer


def parameters() -> list[nn.Parameter]:
    """lora_A (r, in) and lora_B (out, r) of each linear, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [s for i, o in LINEARS * LAYERS for s in ((RANK, i), (o, RANK))]
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


def candidates() -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Each side by its name."""
    sides: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "lorax AdamW": AdamW,
        "lorax PagedAdamW": PagedAdamW,
        "lorax AdamW8bit": AdamW8bit,
        "lorax PagedAdamW8bit": PagedAdamW8bit,
        "torch AdamW foreach=False": lambda ps: torch.optim.AdamW(ps, foreach=False),
        "torch AdamW foreach=True": lambda ps: torch.optim.AdamW(ps, foreach=True),
        "torch AdamW fused=True": lambda ps: torch.optim.AdamW(ps, fused=True),
    }
    try:
        from bitsandbytes import optim
    except ImportError:
        return sides
    for kind in ("AdamW", "PagedAdamW", "AdamW8bit", "PagedAdamW8bit"):
        sides[f"bitsandbytes {kind}"] = getattr(optim, kind)
    return sides


def check_bits(steps: int = 20) -> None:
    """Refuse to time what is not equal to torch."""
    for kind in (AdamW, PagedAdamW):
        ours, theirs = parameters(), parameters()
        pair = (kind(ours), torch.optim.AdamW(theirs, foreach=False))
        for _ in range(steps):
            for optimizer in pair:
                optimizer.step()
        if not all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)):
            raise SystemExit(f"{kind.__name__} is not bit-equal to torch: nothing is timed")


def state_bytes(optimizer: Optimizer) -> int:
    """All tensors of the states, without the maps that bitsandbytes shares between them."""
    held = getattr(optimizer, "state_bytes", None)
    if held is not None:
        return int(held())
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")
    )


def measure(rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds: one step of each side in turn."""
    optimizers = {name: make(parameters()) for name, make in candidates().items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds + 2):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    count = sum(p.numel() for p in parameters())
    return [
        {
            "name": name,
            "milliseconds": round(1e3 * statistics.median(seconds[name][2:]), 2),
            "fastest_milliseconds": round(1e3 * min(seconds[name][2:]), 2),
            "state_bytes": state_bytes(optimizer),
            "state_bytes_per_parameter": round(state_bytes(optimizer) / count, 3),
        }
        for name, optimizer in optimizers.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    check_bits()
    rows = measure(arguments.rounds)
    report = {
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "tensors": 2 * LAYERS * len(LINEARS),
        "parameters": sum(p.numel() for p in parameters()),
        "rounds": arguments.rounds,
        "results": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['name']:28} {row['milliseconds']:8.2f} ms  (fastest "
            f"{row['fastest_milliseconds']:8.2f})  {row['state_bytes_per_parameter']:6.3f} bytes "
            "a parameter"
        )


if __name__ == "__main__":
    main()
