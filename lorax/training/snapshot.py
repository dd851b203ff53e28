"""What a run is between two optimizer steps: taken into files, and put back bit for bit.

What decides the rest of a run, and where it is kept:

    trained parameters      trained.safetensors, in their own dtype
    the optimizer           optimizer.safetensors
    torch's generators      random.safetensors (dropout draws from them)
    the method's own        hook.safetensors and state.json (AdaLoRA's averages and ranks)
    the best so far         best.safetensors and state.json, where early stopping keeps it
    where in the data       the step's number: the order of rows depends on seed and epoch alone
    the learning rate       the step's number

The frozen base is not kept: it is loaded from where it came from. A digest of the rows is, so that
a data file which has changed in between is found.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorax.adapters.attached import adapter_layers
from lorax.data.examples import Example
from lorax.errors import FormatError, UsageError
from lorax.formats.disk import Writer
from lorax.formats.json_files import read_json
from lorax.formats.optimizer_files import load_optimizer_state, save_optimizer_state
from lorax.formats.peft import save_adapter
from lorax.formats.safetensors_files import read_file, write_file
from lorax.models import Model
from lorax.optim import AdamW
from lorax.training.hooks import StepHook

FORMAT = 1


@dataclass
class Progress:
    """How far a run is: the numbers that it goes on with.

    step: optimizer steps done. tokens: trained so far. seconds: spent, over all resumes.
    metrics_bytes: how long metrics.jsonl was. best_loss, since_best: the lowest held-out loss,
    and how many evaluations ago. not_finite: steps in a row that were skipped or rolled back.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    best_loss: float | None = None
    since_best: int = 0
    not_finite: int = 0


@dataclass
class Live:
    """The parts of a run that change with each step.

    best: the trained parameters at the lowest held-out loss, by name; empty unless they are kept.
    """

    model: Model
    optimizer: AdamW
    hook: StepHook
    progress: Progress
    best: dict[str, Tensor]


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What is trained, by the model's names, and the buffers of the adapter's layers."""
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, layer in adapter_layers(model).items():
        made_anew = layer._non_persistent_buffers_set
        for below, buffer in layer.named_buffers(recurse=False):
            if below not in made_anew:
                tensors[f"{name}.{below}"] = buffer
    return tensors


def files_of(live: Live, rows_digest: str) -> dict[str, Writer]:
    """The files of a checkpoint, by name, and what writes each."""
    state = {"format": FORMAT, "rows": rows_digest, "progress": asdict(live.progress)}
    numbers, tensors = live.hook.state()
    state["hook"] = numbers
    trained = trained_tensors(live.model)
    files: dict[str, Writer] = {
        "state.json": lambda path: path.write_text(json.dumps(state, allow_nan=False) + "\n"),
        "trained.safetensors": lambda path: write_file(trained, path),
        "optimizer.safetensors": lambda path: save_optimizer_state(
            live.optimizer.state_dict(), path
        ),
        "random.safetensors": lambda path: write_file(_generators(), path),
    }
    if tensors:
        files["hook.safetensors"] = lambda path: write_file(tensors, path)
    if live.best:
        files["best.safetensors"] = lambda path: write_file(live.best, path)
    if adapter_layers(live.model):
        files["adapter_config.json"] = lambda path: _write_peft(live.model, path.parent)
        files["adapter_model.safetensors"] = lambda path: path.stat()  # is there already
    return files


def restore(path: Path, live: Live, rows_digest: str) -> None:
    """Put a checkpoint's state into a run that was set up alike.

    Raises:
        FormatError: the checkpoint is of another run, or of other rows.
    """
    state = read_json(path / "state.json")
    if state.get("format") != FORMAT:
        raise FormatError(
            f"{path}: format {state.get('format')!r}; this lorax reads {FORMAT}; "
            "resume with the lorax that wrote it, or begin anew in another train.output_dir"
        )
    if state["rows"] != rows_digest:
        raise FormatError(
            f"{path}: the rows are not those that the run was begun with; give data.path its old "
            "content, or start anew in another train.output_dir"
        )
    copy_tensors(read_file(path / "trained.safetensors"), live.model, str(path))
    try:
        live.optimizer.load_state_dict(load_optimizer_state(path / "optimizer.safetensors"))
    except UsageError as error:
        raise FormatError(f"{path / 'optimizer.safetensors'}: {error}") from None
    kept = path / "hook.safetensors"
    live.hook.load_state(state["hook"], read_file(kept) if kept.is_file() else {})
    best = path / "best.safetensors"
    live.best = read_file(best) if best.is_file() else {}
    live.progress = Progress(**state["progress"])
    _set_generators(read_file(path / "random.safetensors"))


def copy_tensors(found: dict[str, Tensor], model: Model, where: str) -> None:
    """Copy trained tensors into the model; every name on either side must have its partner."""
    mine = trained_tensors(model)
    odd = sorted(set(found) ^ set(mine))
    if odd:
        raise FormatError(
            f"{where}: {odd[0]} is trained in the checkpoint or in the run only; "
            "resume with the recipe that the run began with"
        )
    for name, tensor in mine.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise FormatError(
                f"{where}: {name} is {tuple(found[name].shape)} {found[name].dtype}; expected "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(found[name])


def digest_of_rows(*groups: Sequence[Example]) -> str:
    """SHA-256 over token ids and loss masks, in hex."""
    digest = hashlib.sha256()
    for rows in groups:
        for row in rows:
            digest.update(json.dumps([row.ids, [int(t) for t in row.trained]]).encode())
        digest.update(b"|")
    return digest.hexdigest()


def _write_peft(model: Model, directory: Path) -> None:
    """Put the two files of the adapter's PEFT directory beside the others."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        save_adapter(model, Path(scratch) / "adapter")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.move(Path(scratch) / "adapter" / name, directory / name)


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
