"""A run's directory: where each thing lies, who may write there, and how it begins.

    config.toml         the recipe, resolved: training it again repeats the run
    environment.json    versions and machine
    metrics.jsonl       a line an optimizer step, and one an evaluation
    digests.jsonl       what each step computed with, where train.digests asks for it
    loss.png            their picture
    checkpoints/        step-00000050/ ... (lorax/training/checkpoint.py)
    adapter/            what was trained, as a PEFT directory; after full fine-tuning model/

The directory is locked while a run writes there; the system lifts the lock when the process ends,
however it ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from lorax.errors import EnvironmentProblem, RecipeError, UsageError
from lorax.formats.directory import check_free
from lorax.formats.disk import write_text_whole
from lorax.training.recipe import Recipe

# What a run that goes on may change without becoming another run.
FREE_KEYS = (
    *("train.output_dir", "train.save_steps", "train.keep_checkpoints", "train.digests"),
    *("train.parallel", "train.loggers", "runtime.threads"),
)


class RunDirectory:
    """The layout of a run, and the lock on it."""

    def __init__(self, recipe: Recipe):
        self.path = Path(recipe.train.output_dir).expanduser()
        self.config = self.path / "config.toml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.digests = self.path / "digests.jsonl"
        self.picture = self.path / "loss.png"
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / ("model" if recipe.variant.trains_base else "adapter")
        self._lock: int | None = None

    @property
    def is_begun(self) -> bool:
        """Whether a run wrote its recipe there."""
        return self.config.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether what was trained lies there; it is put in place whole."""
        return self.result.is_dir() and any(self.result.iterdir())

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Refuse what cannot be begun or gone on with; nothing is written.

        Raises:
            UsageError: the directory is taken. RecipeError: the run there has another recipe.
        """
        if resume and self.is_begun:
            self._check_recipe(recipe)
            return
        try:
            check_free(self.path)
        except UsageError as error:
            hint = "; --resume goes on with the run there" if self.is_begun else ""
            raise UsageError(f"{error}{hint}") from None

    def begin(self, recipe: Recipe, resume: bool, processes: int = 1) -> None:
        """Make the directory, lock it, and write down the recipe and the machine.

        processes: how many share the run.

        Raises:
            EnvironmentProblem: another run is at work there, or the disk refuses.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if not (resume and self.is_begun):
                check_free(self.path)  # once more: now nobody else writes there
            write_text_whole(self.config, recipe.to_toml())
            text = json.dumps(environment() | {"processes": processes}, indent=2) + "\n"
            write_text_whole(self.environment, text)
        except BaseException as error:
            self.release()
            if not isinstance(error, OSError):
                raise
            raise EnvironmentProblem(
                f"{self.path}: cannot be written ({error.strerror}); give another train.output_dir"
            ) from None

    def release(self) -> None:
        """Let others write there."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def lock(self) -> None:
        """Keep others from writing there.

        Raises:
            EnvironmentProblem: another run is at work there.
        """
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one directory are not found out there
            return
        handle = os.open(self.path, os.O_RDONLY)  # the directory itself: no file to leave behind
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise EnvironmentProblem(
                f"{self.path}: another run is at work there; wait for it, or give another "
                "train.output_dir"
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
            return
        self._lock = handle

    def _check_recipe(self, recipe: Recipe) -> None:
        then = _flat(Recipe.load(self.config, run_plugins=False).model_dump())
        now = _flat(recipe.model_dump())
        changed = [
            f"{key} is {now.get(key)!r}, was {then.get(key)!r}"
            for key in sorted({*then, *now})
            if then.get(key) != now.get(key) and key not in FREE_KEYS
        ]
        if changed:
            raise RecipeError(
                f"{self.config}: the run there has another recipe: {'; '.join(changed)}; resume "
                f"it with its own (lorax train {self.config} --resume), or give another "
                "train.output_dir"
            )


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they bear on the result."""
    names = ("lorax-finetuning", "torch", "numpy", "safetensors", "tokenizers")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "packages": {name: importlib.metadata.version(name) for name in names},
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found
