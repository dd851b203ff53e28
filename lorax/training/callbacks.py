"""Callbacks: plain functions that a program gives to `lorax.train`.

    def sample(line, model):
        if line["step"] % 100 == 0 and "loss" in line:
            print(lorax.generate(model, tokenizer, "Once upon a time", max_new_tokens=20))

    lorax.train(recipe, callbacks=[sample])

Each is called behind every line of metrics.jsonl, with a copy of the line and the model, adapter
included. Gradients are off, and torch's random numbers, the model's mode and the line are as before
when it comes back, so that a run with callbacks is bit for bit the run without them (as long as
they leave the parameters alone). Whoever wants to change a step writes a StepHook (hooks.py).

A callback that returns True ends the run behind this step: it finishes as after its last one. One
that raises ends it too, but first the step is saved as a checkpoint; `--resume` goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorax.errors import PluginError, UsageError
from lorax.models import Model
from lorax.plugins import where_it_failed
from lorax.training.metrics import Line

Callback = Callable[[Line, Model], Any]


class Callbacks:
    """The functions, and what they asked for.

    stop: one has returned True. failure: what the first one that raised is reported as.

    Raises:
        UsageError: one of them cannot be called.
    """

    def __init__(self, functions: Sequence[Callback]):
        for function in functions:
            if not callable(function):
                raise UsageError(
                    f"callbacks: {function!r} is no function; expected functions of (line, model)"
                )
        self._functions = list(functions)
        self.stop = False
        self.failure: PluginError | None = None

    def call(self, line: Line, model: Model) -> None:
        """Call each with this line; none after one has failed."""
        if not self._functions or self.failure is not None:
            return
        was_training = model.training
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=list(cuda)), torch.no_grad():
            for function in self._functions:
                try:
                    self.stop |= function(dict(line), model) is True
                except Exception as error:
                    self.failure = _reported(function, line, error)
                    break
        model.train(was_training)


def _reported(function: Callback, line: Line, error: Exception) -> PluginError:
    """The function, the place of its own code that failed, and why."""
    name = getattr(function, "__name__", type(function).__name__)
    made = PluginError(
        f"callback {name} failed at step {line['step']} ({where_it_failed(error)}); mend it, or "
        "leave it out"
    )
    made.__cause__ = error
    return made
