"""Other programs' logs of a run, beside metrics.jsonl: TensorBoard and trackio.

A recipe says `train.loggers = ["tensorboard", "trackio"]`. Each logger takes the numbers of every
line of metrics.jsonl, under the line's own names, at the line's step.

metrics.jsonl is the record and a logger its copy. So a run that goes on takes the copy away and
makes it anew from the lines that the checkpoint knew of: no step is there twice, and none that was
lost with the process is missing. A logger that fails is a warning, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lorax.errors import EnvironmentProblem
from lorax.text import one_line
from lorax.training.metrics import Line

log = logging.getLogger("lorax")


class Logger(Protocol):
    """One program's log of one run."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of one line of metrics.jsonl."""

    def close(self) -> None:
        """No more lines; what was given is on the disk."""


class TensorBoardLogger:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN`."""

    def __init__(self, run: Path, goes_on: bool):
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        for old in folder.glob("events.out.tfevents.*") if goes_on else ():
            old.unlink()
        self._writer: Any = SummaryWriter(folder)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A scalar for each number."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class TrackioLogger:
    """A run in trackio's project "lorax", named by the run's whole path: `trackio show`."""

    project = "lorax"

    def __init__(self, run: Path, goes_on: bool):
        import trackio

        self._trackio: Any = trackio
        name = str(run.absolute())
        with _silent():
            if goes_on:
                for old in [r for r in trackio.Api().runs(self.project) if r.name == name][-1:]:
                    old.delete()
            quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
            trackio.init(project=self.project, name=name, resume="never", **quiet)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """All numbers at once."""
        with _silent():
            self._trackio.log(numbers, step=step)

    def close(self) -> None:
        """Wait until trackio has stored them."""
        with _silent():
            self._trackio.finish()


_MAKERS: dict[str, Callable[[Path, bool], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "trackio": TrackioLogger,
}


def check_installed(names: Iterable[str]) -> None:
    """Refuse a logger whose package is missing; nothing is imported.

    Raises:
        EnvironmentProblem: with the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise EnvironmentProblem(
                f"train.loggers: {name} is not installed: pip install {name}, or take it out of "
                "train.loggers; metrics.jsonl is always written"
            )


class Loggers:
    """All loggers of a run.

    Args:
        names: of those that the recipe asks for.
        run: the run's directory.
        lines: what metrics.jsonl holds already, where the run goes on.
        goes_on: whether an earlier process may have left a log of this run.
    """

    def __init__(self, names: Sequence[str], run: Path, lines: Sequence[Line], goes_on: bool):
        self._loggers: dict[str, Logger] = {}
        for name in names:
            with self._dropped_if_it_fails(name):
                self._loggers[name] = _MAKERS[name](run, goes_on)
        for line in lines:
            self.write(line)

    def write(self, line: Line) -> None:
        """Give a line to each of them."""
        numbers = {k: float(v) for k, v in line.items() if k != "step" and _is_number(v)}
        for name, logger in list(self._loggers.items()):
            with self._dropped_if_it_fails(name):
                logger.write(line["step"], numbers)

    def close(self) -> None:
        """Close each of them."""
        for name, logger in list(self._loggers.items()):
            with self._dropped_if_it_fails(name):
                logger.close()
        self._loggers = {}

    @contextlib.contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # another program's: its disk, its network, its bugs
            self._loggers.pop(name, None)
            log.warning("%s failed, and the run goes on without it: %s", name, one_line(error))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """trackio tells its own story on stdout."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
