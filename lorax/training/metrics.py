"""What a run writes down: metrics.jsonl line by line, and its picture."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax.errors import EnvironmentProblem, FormatError
from lorax.text import one_line

Line = dict[str, Any]
log = logging.getLogger("lorax")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a person's share of it, a file


class MetricsFile:
    """metrics.jsonl: one JSON object a line, readable as soon as it is known.

    Args:
        path: the file; made anew, or gone on with.
        keep_bytes: how much of what is there stays; 0 begins anew.

    Raises:
        EnvironmentProblem: the disk is full or refuses. FormatError: the file is shorter than what
            is to be kept, or damaged.
    """

    def __init__(self, path: Path, keep_bytes: int = 0):
        self.lines: list[Line] = []
        self._path = path
        try:
            self._file = path.open("r+b" if keep_bytes else "wb")
            if keep_bytes:
                self._keep(keep_bytes)
        except OSError as error:
            raise self._problem(error) from None

    def write(self, line: Line) -> None:
        """Append a line."""
        self.lines.append(line)
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._problem(error) from None

    def sync(self) -> int:
        """Flush all lines to the disk; the file's length in bytes."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._problem(error) from None
        return self._file.tell()

    def close(self) -> None:
        """Close the file; no line can be written after it."""
        with contextlib.suppress(OSError):  # a full disk: `write` has said so
            self._file.close()

    def _keep(self, length: int) -> None:
        """Read the first `length` bytes, and cut off the rest."""
        kept = self._file.read(length)
        if len(kept) < length or not kept.endswith(b"\n"):
            raise FormatError(
                f"{self._path}: {len(kept)} bytes; the checkpoint was taken when it had {length}. "
                "It was changed since; begin anew in another train.output_dir"
            )
        try:
            self.lines = parse_lines(kept)
        except ValueError as error:
            raise FormatError(f"{self._path}: damaged ({error}); begin anew elsewhere") from None
        self._file.truncate(length)
        self._file.seek(length)

    def _problem(self, error: OSError) -> EnvironmentProblem:
        reason = error.strerror or str(error)
        return EnvironmentProblem(
            f"{self._path}: cannot be written ({reason}); expected room for a line a step: free "
            "some, then go on with --resume"
        )


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl.

    Raises:
        FormatError: it cannot be read, or is damaged.
    """
    try:
        return parse_lines(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); expected one JSON object a line"
        ) from None


def parse_lines(content: bytes) -> list[Line]:
    """Each line as an object with its step.

    Raises:
        ValueError: one is damaged; the message has its number.
    """
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise ValueError(f"line {number} is no object with a step")
        lines.append(line)
    return lines


def draw_loss(lines: Sequence[Line], path: Path, warn: bool = True) -> None:
    """`plot_loss`, where a picture that fails is a warning in the log at most, and costs nothing.

    warn: False where another error is on its way to the user.

    Raises:
        EnvironmentProblem: the disk is full, and `warn`; what was trained is saved by then.
    """
    try:
        plot_loss(lines, path)
    except Exception as error:  # the disk, a font, a missing or broken matplotlib
        if warn and isinstance(error, OSError) and error.errno in FULL:
            path.unlink(missing_ok=True)  # half a picture
            raise EnvironmentProblem(
                f"{path}: could not be written ({error.strerror}); what was trained is saved: free "
                "some room before you merge it"
            ) from None
        if warn:
            log.warning("%s: the picture was not drawn (%s)", path, one_line(error))


def plot_loss(lines: Sequence[Line], path: Path) -> None:
    """Draw training and evaluation loss (nats a token) over optimizer steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [line for line in lines if isinstance(line.get("loss"), float)]
    evaluations = [line for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.84))  # looking for a layout doubles the time
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
