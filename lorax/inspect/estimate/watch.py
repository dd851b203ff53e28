"""A run's memory: the estimate before it starts, a warning, and what it came to in the end.

    environment.json    "memory": {"predicted_bytes", "peak_bytes"}; the peak is that of the process
                        when the run ends or fails; until then, and if it is killed, it is null

`lorax train` puts this in front of the listener that shows the progress; the loop knows neither.
Tracing a step takes 1 to 3 s; LORAX_ESTIMATE=0 leaves it out, for many short runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from lorax.errors import LoraxError
from lorax.formats.disk import write_text_whole
from lorax.formats.hub import find_model
from lorax.formats.json_files import read_json
from lorax.inspect.estimate.configs import find_config
from lorax.inspect.estimate.peak import Estimate, estimate
from lorax.inspect.estimate.process import free_bytes, peak_bytes, process_bytes, resident_bytes
from lorax.inspect.estimate.report import line, size
from lorax.inspect.estimate.setting import setting_of_recipe
from lorax.training.loop import Listener
from lorax.training.metrics import Line
from lorax.training.plan import Plan
from lorax.training.run_directory import RunDirectory


class MemoryWatch(Listener):
    """Passes all on to `listener`; says what a run will take, and writes down what it took.

    say: is told the estimate; warn: that it does not fit.
    """

    def __init__(self, listener: Listener, say: Callable[[str], None], warn: Callable[[str], None]):
        self._listener, self._say, self._warn = listener, say, warn
        self._process = process_bytes()  # while there is no model in it
        self._file: Path | None = None
        self._predicted: int | None = None
        self._is_written = False

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write(self._peak())

    def planned(self, plan: Plan) -> None:
        """Estimate, say it, and warn where it does not fit."""
        self._listener.planned(plan)
        recipe = plan.recipe
        self._device = recipe.model.device
        self._file = RunDirectory(recipe).environment
        if os.environ.get("LORAX_ESTIMATE") == "0":
            return
        try:
            where = find_model(recipe.model.path, recipe.model.revision)
            known = find_config(str(where))
            setting = setting_of_recipe(recipe, known, plan.train_rows)
            found = estimate(known.config, setting, self._process)
        except Exception as error:  # whatever it is: an estimate is no reason not to train
            self._warn(f"memory is not estimated: {error}")
            return
        self._predicted = found.peak_bytes
        self._say(f"memory   {line(found)}")
        self._check(found)

    def resumed(self, step: int, checkpoint: Path | None) -> None:
        """Pass it on."""
        self._listener.resumed(step, checkpoint)

    def measured(self, line: Line) -> None:
        """Write down the prediction once, in case the process is killed, and pass the line on."""
        if not self._is_written:
            self._write(None)
        self._listener.measured(line)

    def said(self, text: str) -> None:
        """Pass it on."""
        self._listener.said(text)

    def _check(self, found: Estimate) -> None:
        """Warn where what is still to come is more than what is free."""
        free = free_bytes(self._device)
        needed = found.peak_bytes - _held(self._device)
        if free is not None and needed > free:
            self._warn(
                f"this run will likely be killed for memory: it needs {size(needed)} more and "
                f"{size(free)} are free; lower train.micro_batch_size or data.max_length, set "
                "model.gradient_checkpointing = true or model.quantization = 'nf4-dq', or see "
                "lorax estimate"
            )

    def _peak(self) -> int:
        if self._file is not None and self._device != "cpu":
            return torch.cuda.max_memory_allocated()
        return peak_bytes()

    def _write(self, peak: int | None) -> None:
        """Into environment.json, if the run has got as far as to make one."""
        if self._file is None or not self._file.is_file():
            return
        self._is_written = True
        memory = {"predicted_bytes": self._predicted, "peak_bytes": peak}
        try:
            text = json.dumps(read_json(self._file) | {"memory": memory}, indent=2) + "\n"
            write_text_whole(self._file, text)
        except (LoraxError, OSError) as error:
            self._warn(f"{self._file}: the peak of memory is not written down ({error})")


def _held(device: str) -> int:
    """What this process has already of it."""
    return resident_bytes() if device == "cpu" else torch.cuda.memory_allocated()
