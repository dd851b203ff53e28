"""The kernels on a GPU: first the whole kernel test suite, then, only if it is green, timings.

    python benchmarks/gpu_suite.py                  ends in under 8 minutes
    python benchmarks/gpu_suite.py --tests-only
    python benchmarks/gpu_suite.py --table          the README's table from the newest results

Needs torch, triton, numpy, safetensors and pytest; lorax need not be installed. bitsandbytes is
timed beside lorax where it can be imported; matplotlib draws the plot where it can.

How it is timed. CUDA events around each single call, sides interleaved call by call, median with
p20 and p80. Small calls cost the host more than the GPU, so every call is captured in a CUDA graph
first and the graph is replayed. "cold": a buffer larger than the L2 cache is written before each
replay, outside the events; "warm": the same call at once again. A share of bandwidth or of bf16
peak is taken against what this GPU reaches here: a large copy, and a large product of random
matrices, not a data sheet. Optimizers are timed by the host's clock instead, interleaved step by
step: gathering 450 addresses is part of what a step costs. "step" is until the stream that trains
is free again, "settled" until pages that go back to the host have arrived, too.

Writes benchmarks/results/GPU-DATE.json and .png: the figures, the GPU, versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import torch
import triton

ROOT = Path(__file__).parents[1]
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BUDGET_SECONDS = 8 * 60
RANK = 16


class Timer:
    """Times captured calls, interleaved, with and without their data in the L2 cache."""

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self.evictor = torch.empty(max(size, 2**26), dtype=torch.uint8, device="cuda")
        self.stream = torch.cuda.Stream()

    def capture(self, call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Warm up and capture on one stream: buffers kept for a stream exist before the capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            call()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph

    def capture_all(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """A graph for each call; a rival that cannot be captured is left out, and named."""
        graphs = {}
        for name, call in calls.items():
            try:
                graphs[name] = self.capture(call)
            except Exception as error:
                if name != "bitsandbytes":
                    raise
                print(f"bitsandbytes is not timed: {error!r}")
        return graphs

    def compare(self, calls: dict[str, Callable[[], Any]], repeats: int = 30) -> dict[str, Any]:
        """Microseconds for each call: {name: {"cold": {...}, "warm": {...}}}."""
        graphs = self.capture_all(calls)
        events: dict[tuple[str, str], list[Any]] = {}
        for _ in range(repeats):
            for name, graph in graphs.items():
                self.evictor.fill_(1)
                for state in ("cold", "warm"):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    graph.replay()
                    end.record()
                    events.setdefault((name, state), []).append((begin, end))
        torch.cuda.synchronize()
        found: dict[str, Any] = {name: {} for name in graphs}
        for (name, state), pairs in events.items():
            times = [1000 * begin.elapsed_time(end) for begin, end in pairs]
            fifths = quantiles(times, n=5)
            found[name][state] = {
                "median_us": round(median(times), 2),
                "p20_us": round(fifths[0], 2),
                "p80_us": round(fifths[3], 2),
            }
        return found


def run_tests() -> dict[str, Any]:
    """The kernel tests on this device, in several processes: most of their time is compiling."""
    begin = time.monotonic()
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    compiled = [str(file) for file in files if file.stem == "test_kernels_compiled"]
    others = [str(file) for file in files if file.stem != "test_kernels_compiled"]
    alone = [
        str(ROOT / "tests" / "optim" / "test_optim_gpu.py")
    ]  # it measures the whole device's memory
    command = [sys.executable, "-m", "pytest"]
    listing = subprocess.run(
        [*command, *others, "--collect-only", "-q", "-o", "addopts="],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = [line for line in listing.stdout.splitlines() if "::" in line]
    if listing.returncode or not names:
        print(listing.stdout, listing.stderr, sep="\n")
        return {"green": False, "summary": "the tests could not be collected", "seconds": 0}
    workers = max(1, min(8, (os.cpu_count() or 2) - 1))
    groups = [compiled, *(names[at::workers] for at in range(workers))]
    running = [
        subprocess.Popen(
            [*command, "-q", *group],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for group in groups
    ]
    outputs = [process.communicate()[0] for process in running]
    codes = [process.returncode for process in running]
    last = subprocess.run([*command, "-q", *alone], cwd=ROOT, capture_output=True, text=True)
    outputs.append(last.stdout + last.stderr)
    codes.append(last.returncode)
    for code, output in zip(codes, outputs, strict=True):
        print(output[-4000:] if code else output.strip().splitlines()[-1])
    return {
        "green": not any(codes),
        "summary": [output.strip().splitlines()[-1] for output in outputs],
        "seconds": round(time.monotonic() - begin, 1),
    }


def ceilings(timer: Timer) -> dict[str, float]:
    """What this GPU reaches: bytes copied a second (read and written), bf16 operations a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    found = timer.compare({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 10)
    return {
        "bytes_a_second": 2 * source.nbytes / (1e-6 * found["copy"]["cold"]["median_us"]),
        "bf16_operations_a_second": 2 * 8192**3 / (1e-6 * found["product"]["cold"]["median_us"]),
    }


def make_weight(N: int, K: int) -> Any:
    """A random NF4 weight with double quantization, quantized on the GPU by lorax's kernels."""
    from lorax.kernels.quantize import quantize_4bit, quantize_8bit
    from lorax.kernels.weight import PackedWeight
    from lorax.quant import codebooks
    from lorax.quant.dynamic_map import dynamic_map

    code, dynamic = codebooks.four_bit("nf4").cuda(), dynamic_map().cuda()
    packed, absmax = quantize_4bit(torch.randn(N, K, device="cuda"), code, 64)
    offset = absmax.mean()
    codes, second = quantize_8bit(absmax - offset, dynamic, 256)
    return PackedWeight(packed, codes, code, (N, K), 64, second, dynamic, offset)


def bitsandbytes_side(N: int, K: int) -> Any:
    """bitsandbytes' module and a weight of its own, or None where it cannot be used."""
    try:
        import bitsandbytes as bnb

        W = torch.randn(N, K, device="cuda").bfloat16()
        packed, state = bnb.functional.quantize_4bit(
            W, quant_type="nf4", blocksize=64, compress_statistics=True
        )
        bnb.functional.dequantize_4bit(packed, state)
    except Exception as error:  # an optional rival may fail in its own ways
        print(f"bitsandbytes is not timed: {error!r}")
        return None
    return bnb, packed, state


def time_dequantize(timer: Timer, limits: dict[str, float]) -> list[dict[str, Any]]:
    from lorax.kernels.dequantize import dequantize

    rows: list[dict[str, Any]] = []
    for N, K in SHAPES:
        weight = make_weight(N, K)
        out = torch.empty(N, K, dtype=torch.bfloat16, device="cuda")
        calls: dict[str, Callable[[], Any]] = {"lorax": partial(dequantize, weight, out)}
        if rival := bitsandbytes_side(N, K):
            bnb, packed, state = rival
            calls["bitsandbytes"] = partial(bnb.functional.dequantize_4bit, packed, state)
        moved = weight.packed.nbytes + weight.absmax.nbytes + out.nbytes
        rows.append(with_shares({"N": N, "K": K}, timer.compare(calls), moved, 0, limits))
    return rows


def time_products(timer: Timer, limits: dict[str, float], deadline: float) -> list[dict[str, Any]]:
    from lorax.kernels import matmul

    rows: list[dict[str, Any]] = []
    for N, K in SHAPES:
        weight, rival = make_weight(N, K), bitsandbytes_side(N, K)
        dense = torch.randn(N, K, device="cuda").bfloat16()
        for M in ROWS:
            if time.monotonic() > deadline:
                print(f"out of time before {N}x{K}, M = {M}")
                return rows
            x = torch.randn(M, K, device="cuda").bfloat16()
            dy = torch.randn(M, N, device="cuda").bfloat16()
            calls: dict[str, Callable[[], Any]] = {
                "torch bf16": partial(torch.nn.functional.linear, x, dense),
                "lorax": partial(matmul.matmul, x, weight),
                "lorax dx": partial(matmul.matmul_dx, dy, weight),
                "torch bf16 dx": partial(torch.matmul, dy, dense),
            }
            if M <= 512:
                calls["fused"] = partial(matmul.fused, x, weight)
                calls["unfused"] = partial(matmul.unfused, x, weight)
            if rival:
                bnb, packed, state = rival
                calls["bitsandbytes"] = partial(bnb.matmul_4bit, x, packed.t(), quant_state=state)
            moved = weight.packed.nbytes + weight.absmax.nbytes + 2 * M * (N + K)
            times = timer.compare(calls, 30 if M <= 256 else 10)
            case = {"N": N, "K": K, "M": M}
            rows.append(with_shares(case, times, moved, 2 * M * N * K, limits))
    return rows


def time_training(timer: Timer) -> dict[str, Any]:
    """A LoRA linear, and the cross entropy over a Llama-3 head."""
    from lorax.kernels import cross_entropy, lora

    found: dict[str, Any] = {}
    weight = make_weight(4096, 4096)
    A = torch.randn(RANK, 4096, device="cuda")
    B = torch.randn(4096, RANK, device="cuda")
    x = torch.randn(2048, 4096, device="cuda").bfloat16()
    y, h = lora.forward(x, weight, None, A, B, 2.0)
    found["LoRA linear 4096x4096, M = 2048"] = timer.compare(
        {
            "forward": lambda: lora.forward(x, weight, None, A, B, 2.0),
            "backward": lambda: lora.backward(y, x, h, weight, A, B, 2.0),
        }
    )
    head = torch.randn(128256, 4096, device="cuda").bfloat16()
    targets = torch.randint(128256, (2048,), device="cuda")

    found["cross entropy, 2048 x 128256, with dX"] = timer.compare(
        {
            "lorax": partial(cross_entropy.cross_entropy, x, head, targets),
            "torch, whole": partial(whole_cross_entropy, x, head),
        },
        5,
    )
    return found


def whole_cross_entropy(x: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is saved: all logits at once, in float32 too. (The target's -1 is left out.)"""
    logits = (x @ head.t()).float()
    log_sum = torch.logsumexp(logits, 1, keepdim=True)
    return log_sum.sum(), (logits - log_sum).exp().bfloat16() @ head


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


def with_shares(
    case: dict[str, Any],
    times: dict[str, Any],
    moved_bytes: int,
    operations: int,
    limits: dict[str, float],
) -> dict[str, Any]:
    """The case with, for lorax cold, the share of this GPU's bandwidth and of its bf16 rate."""
    seconds = 1e-6 * times["lorax"]["cold"]["median_us"]
    case |= {
        "times": times,
        "share_of_bandwidth": round(moved_bytes / seconds / limits["bytes_a_second"], 3),
        "share_of_bf16": round(operations / seconds / limits["bf16_operations_a_second"], 3),
    }
    for rival in ("torch bf16", "bitsandbytes"):
        if rival in times:
            ratio = times[rival]["cold"]["median_us"] / times["lorax"]["cold"]["median_us"]
            case[f"times as fast as {rival}"] = round(ratio, 3)
    return case


def crossovers(products: list[dict[str, Any]]) -> dict[str, int]:
    """For each shape the largest M measured at which the fused kernel was the faster one."""
    found: dict[str, int] = {}
    for row in products:
        times = row["times"]
        if "fused" in times:
            gain = times["unfused"]["cold"]["median_us"] - times["fused"]["cold"]["median_us"]
            shape = f"{row['N']}x{row['K']}"
            found[shape] = max(found.get(shape, 0), row["M"] if gain > 0 else 0)
    return found


def environment() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--porcelain", "--untracked-files=no"),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def median_ratio(times: dict[str, Any], side: str, rival: str = "torch bf16") -> float:
    ratio: float = times[side]["cold"]["median_us"] / times[rival]["cold"]["median_us"]
    return ratio


def draw(report: dict[str, Any], path: Path) -> None:
    """How many times as fast as torch bf16, by M; one panel a shape."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    figure, panels = plt.subplots(1, len(SHAPES), figsize=(15, 4.5), sharey=True)
    for panel, (N, K) in zip(panels, SHAPES, strict=True):
        rows = [row for row in report["products"] if (row["N"], row["K"]) == (N, K)]
        for side in ("lorax", "fused", "unfused", "bitsandbytes"):
            points = [
                (row["M"], 1 / median_ratio(row["times"], side))
                for row in rows
                if side in row["times"]
            ]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=side)
        panel.axhline(1, color="gray", linewidth=1)
        panel.set(xscale="log", title=f"W {N} x {K}", xlabel="M (rows of x)")
    panels[0].set_ylabel("times as fast as torch bf16 (L2 cold)")
    panels[0].legend()
    figure.suptitle(f"{report['environment']['gpu']}, NF4 with double quantization")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_products(products: list[dict[str, Any]]) -> None:
    sides = ("torch bf16", "bitsandbytes", "lorax", "fused", "unfused")
    print(f"{'N':>6}{'K':>6}{'M':>6}" + "".join(f"{side:>14}" for side in sides) + f"{'share':>8}")
    for row in products:
        cells = [row["times"].get(side, {}).get("cold", {}).get("median_us", "") for side in sides]
        share = row["share_of_bandwidth"] if row["M"] <= 64 else row["share_of_bf16"]
        line = f"{row['N']:>6}{row['K']:>6}{row['M']:>6}"
        print(line + "".join(f"{cell:>14}" for cell in cells) + f"{share:>8}")


def table(directory: Path) -> str:
    """The README's table, in Markdown, from the newest results; or a line that there are none."""
    reports = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    reports = [report for report in reports if "products" in report]
    if not reports:
        return "No GPU has been at hand yet: `make gpu` fills this table."
    report = max(reports, key=lambda found: found["environment"]["date"])
    about = report["environment"]
    lines = [
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit "
        f"{about['commit'][:10]}, {about['date'][:10]}. NF4 with double quantization, bf16, "
        "L2 cold.",
        "",
        "| W | M | lorax, us | p20-p80 | torch bf16 | bitsandbytes | of bandwidth | of bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["products"]:
        times = {name: found["cold"] for name, found in row["times"].items()}
        mine = times["lorax"]
        rivals = [
            times.get(name, {}).get("median_us", "-") for name in ("torch bf16", "bitsandbytes")
        ]
        cells = [
            f"{row['N']}x{row['K']}",
            row["M"],
            mine["median_us"],
            f"{mine['p20_us']}-{mine['p80_us']}",
            *rivals,
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['share_of_bf16']:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, *optimizer_lines(report.get("optimizers", []))])


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tests-only", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.output))
        return 0
    begin = time.monotonic()
    if not torch.cuda.is_available():
        print("gpu_suite: no CUDA device here; nothing was measured", file=sys.stderr)
        return 3
    tests = run_tests()
    if not tests["green"]:
        print("gpu_suite: the tests are red; no time is taken", file=sys.stderr)
        return 1
    if arguments.tests_only:
        return 0
    import kernel_testing  # noqa: F401  makes lorax.kernels importable where lorax is not installed

    torch.manual_seed(0)
    timer = Timer()
    limits = ceilings(timer)
    deadline = begin + BUDGET_SECONDS - 60
    report: dict[str, Any] = {
        "environment": environment(),
        "tests": tests,
        "ceilings": limits,
        "dequantize": time_dequantize(timer, limits),
        "training": time_training(timer),
        "optimizers": time_optimizers(),
        "products": time_products(timer, limits, deadline),
    }
    report["crossover"] = crossovers(report["products"])
    report["seconds"] = round(time.monotonic() - begin, 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpu = report["environment"]["gpu"].replace(" ", "-")
    path = arguments.output / f"{gpu}-{datetime.now():%Y-%m-%d}.json"
    path.write_text(json.dumps(report, indent=1))
    draw(report, path.with_suffix(".png"))
    print_products(report["products"])
    for row in report["dequantize"]:
        print(f"dequantize {row['N']}x{row['K']}: {row['share_of_bandwidth']:.1%} of bandwidth")
    print(json.dumps({"training": report["training"], "crossover": report["crossover"]}, indent=1))
    print(*optimizer_lines(report["optimizers"]), sep="\n")
    print(f"{path}, {report['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
