"""What a run writes down: metrics.jsonl line by line, and its picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on the disk as soon as it is known."""

    def __init__(self, path: Path):
        self.lines: list[Line] = []
        self._file = path.open("w", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append a line."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def plot_loss(lines: Sequence[Line], path: Path) -> None:
    """Draw training and evaluation loss (nats a token) over optimizer steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], ".-", color="#4c78a8",
              lw=1.2, ms=4, label="training, each step's rows")  # fmt: skip
    if evaluations:
        axes.plot([e["step"] for e in evaluations], [e["eval_loss"] for e in evaluations], "o-",
                  color="#e45756", lw=1.5, ms=5, label="held out")  # fmt: skip
        for e in (evaluations[0], evaluations[-1]):
            axes.annotate(f"{e['eval_loss']:.3f}", (e["step"], e["eval_loss"]), xytext=(6, 6),
                          textcoords="offset points", color="#e45756")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
