"""Digests of each optimizer step, so that two runs that should be one can be told apart.

With `train.digests = true` a run leaves digests.jsonl beside metrics.jsonl, a line a step:

    {"step": 3, "batch": "0f3c...", "random": "91ab...",
     "gradients": {NAME: "77d0...", ...}, "parameters": {NAME: "c51e...", ...}}

Each is the first 16 hexadecimal digits of a SHA-256 over bytes: the batch's token ids and masks;
the state of torch's generator before the step; every gradient before clipping; every trained
parameter after the step. `lorax inspect diff` names the first place where two runs part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorax.data.examples import Example
from lorax.training.metrics import Line, MetricsFile

DIGITS = 16


class StepDigests:
    """digests.jsonl of a run; `gradients` and `finish` are called in each step.

    path: the file. last_step: the lines up to it stay; what a killed run wrote behind is cut off.
    """

    def __init__(self, path: Path, model: nn.Module, last_step: int):
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._file = MetricsFile(path, _length(path, last_step))
        self._line: Line = {}

    def begin(self, step: int, rows: Sequence[Example]) -> None:
        """Note the step's rows and the random generator's state, before its first micro-batch."""
        ids = json.dumps([[row.ids, row.trained] for row in rows]).encode()
        self._line = {"step": step, "batch": _hex([ids]), "random": of(torch.get_rng_state())}

    def gradients(self) -> None:
        """Note each gradient's digest, behind the last backward and before clipping."""
        found = {name: of(p.grad) for name, p in self._named if p.grad is not None}
        self._line["gradients"] = found

    def finish(self) -> None:
        """Note each trained tensor's digest, behind the optimizer's step, and write the line."""
        self._line["parameters"] = {name: of(p) for name, p in self._named}
        self._file.write(self._line)

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def of(tensor: Tensor) -> str:
    """The digest of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return _hex([str(tensor.dtype).encode(), flat.view(torch.uint8).numpy()])


def _hex(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def _length(path: Path, last_step: int) -> int:
    """How many bytes of a file hold the steps up to `last_step`."""
    if not last_step or not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    return sum(len(line) for line in lines[:last_step])
