"""What a run writes down: metrics.jsonl line by line, and its picture."""

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax.errors import EnvironmentProblem, one_line

Line = dict[str, Any]
log = logging.getLogger("lorax")


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on the disk as soon as it is known."""

    def __init__(self, path: Path):
        self.lines: list[Line] = []
        self._path = path
        self._file = path.open("w", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append a line.

        Raises:
            EnvironmentProblem: the disk is full or refuses.
        """
        self.lines.append(line)
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise EnvironmentProblem(
                f"{self._path}: step {line['step']} could not be written ({error.strerror}); "
                "expected room for a line a step: free some and run again"
            ) from None

    def close(self) -> None:
        """No more lines."""
        with contextlib.suppress(OSError):  # what `write` could not put down, and has reported
            self._file.close()


def draw_loss(lines: Sequence[Line], path: Path, warn: bool = True) -> None:
    """`plot_loss`, where a picture that fails is a warning in the log at most, and costs nothing.

    warn: False where another error is on its way to the user.
    """
    try:
        plot_loss(lines, path)
    except Exception as error:  # the disk, a font, a missing or broken matplotlib
        if warn:
            log.warning("%s: the picture was not drawn (%s)", path, one_line(error))


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
