"""How a training step's time and memory grow with tokens, rank and layers, on a CPU.

    python benchmarks/scaling.py            every point in a process of its own, some minutes
    python benchmarks/scaling.py --draw     draws the picture from the results file again

Each point is `lorax.train` with a user's defaults: LoRA on every Linear of a Llama of random
weights in float32, one row a step. Two of the three sizes stay where the third one moves. A step's
seconds are the processor's, on one thread, the median over the steps behind the first two;
memory is what the process grew by in training. The slope between two points is log(time) over
log(size): 1 is linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sides
import torch
from training_throughput import WORDS, make_folder

import lorax
from lorax.training.loop import Listener
from lorax.training.metrics import Line

RESULT, PICTURE = sides.RESULTS / "scaling-cpu.json", sides.RESULTS / "scaling-cpu.png"
AXES = {
    "tokens": [128, 256, 512, 1024, 2048, 4096],
    "rank": [1, 8, 32, 128, 512],
    "layers": [1, 2, 4, 8, 16],
}
USUAL = {"tokens": 512, "rank": 16, "layers": 4}
STEPS, WARM = 7, 2
COLORS = {"seconds": "#4c78a8", "grown_bytes": "#e45756"}


def measure_point(size: dict[str, int]) -> dict[str, float]:
    """Median seconds of a step, and bytes that the process grew by from the first to the last."""
    torch.set_num_threads(1)
    moments, peak = [], []

    class Clock(Listener):
        def planned(self, plan: Any) -> None:
            peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

        def measured(self, line: Line) -> None:
            moments.append(time.process_time())

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folder(folder, rows=0, layers=size["layers"], positions=max(AXES["tokens"]))
        text = " ".join(f"w{3 + i % (WORDS - 3)}" for i in range(size["tokens"] - 1))
        (folder / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * STEPS)
        recipe = {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "adapter": {"r": size["rank"], "target_modules": "all-linear"},
            "data": {"path": str(folder / "rows.jsonl"), "max_length": size["tokens"]},
            "train": {"output_dir": str(folder / "run"), "batch_size": 1, "save_steps": 0},
        }
        lorax.train(lorax.Recipe.from_dict(recipe), Clock())
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    steps = [b - a for a, b in zip(moments[WARM - 1 :], moments[WARM:], strict=False)]
    return {"seconds": statistics.median(steps), "grown_bytes": 1024 * (peak[1] - peak[0])}


def slopes(points: list[dict[str, Any]], axis: str) -> list[float]:
    """Of each two neighbours: log(seconds' ratio) / log(size's ratio)."""
    pairs = itertools.pairwise(points)
    return [math.log(b["seconds"] / a["seconds"]) / math.log(b[axis] / a[axis]) for a, b in pairs]


def measure() -> dict[str, Any]:
    found: dict[str, Any] = {"usual": USUAL, "axes": {}, "slopes": {}}
    for axis, sizes in AXES.items():
        points = []
        for size in sizes:
            whole = USUAL | {axis: size}
            command = [sys.executable, __file__, "--point", json.dumps(whole)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            points.append(whole | json.loads(said.splitlines()[-1]))
            print(f"{axis} {size:5}  {points[-1]['seconds']:.3f} s", flush=True)
        found["axes"][axis], found["slopes"][axis] = points, slopes(points, axis)
    return found | {"threads": 1, "machine": sides.machine("torch")}


def draw(found: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (axis, points) in zip(figure.subplots(1, 3), found["axes"].items(), strict=True):
        sizes = [p[axis] for p in points]
        for name, color in COLORS.items():
            largest = points[-1][name]
            label = "seconds a step" if name == "seconds" else "memory"
            axes.plot(sizes, [p[name] / largest for p in points], "o-", color=color, label=label)
        linear = [n / sizes[-1] for n in sizes]
        axes.plot(sizes, linear, "--", color="#9a9a9a", lw=1, label="in proportion")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel(axis)
        axes.set_title(f"at {sizes[-1]:,}: {points[-1]['seconds']:.2f} s, "
                       f"{points[-1]['grown_bytes'] / 1e6:,.0f} MB", fontsize=9)  # fmt: skip
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of the last point")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="from the results file")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure_point(options.point)))
        return
    if not options.draw:
        sides.write_results("scaling-cpu", measure())
    found = json.loads(RESULT.read_text())
    draw(found)
    for axis, numbers in found["slopes"].items():
        print(f"{axis}: slopes {', '.join(f'{x:.2f}' for x in numbers)}")


if __name__ == "__main__":
    main()
