"""Checkpoints: a run as it stood after an optimizer step, complete or not there.

    checkpoints/step-00000050/
        state.json             numbers: step, tokens, seconds, how long metrics.jsonl was, ...
        trained.safetensors    every parameter that is trained, bit for bit, under the model's names
        optimizer.safetensors  the optimizer's state_dict
        random.safetensors     the states of torch's random number generators
        hook.safetensors       what the method keeps between steps (AdaLoRA's averages), if anything
        best.safetensors       the best parameters so far, where early stopping keeps them
        adapter_config.json  adapter_model.safetensors     the same as a PEFT adapter, for other use
        manifest.json          {"step", "files": {NAME: {"bytes", "sha256"}}, "versions", "sha256"}

The manifest is written last and holds a check value of its own, so one changed bit or a missing end
anywhere is found. The directory appears by one rename (lorax/formats/disk.py). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorax.errors import EnvironmentProblem, FormatError
from lorax.formats.disk import Disk, Writer, write_whole
from lorax.formats.json_files import read_json

log = logging.getLogger("lorax")

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def directory_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def write_checkpoint(
    checkpoints: Path, step: int, files: Mapping[str, Writer], disk: Disk | None = None
) -> Path:
    """Write a step's checkpoint.

    Args:
        checkpoints: the directory that holds them; made if need be.
        files: each file's name, and what writes it.
        disk: the file system; another one in tests.

    Raises:
        EnvironmentProblem: the disk is full or refuses; earlier checkpoints are as they were.
    """
    disk = disk or Disk()
    target = checkpoints / directory_of(step)
    written: dict[str, dict[str, Any]] = {}

    def noted(name: str, writer: Writer) -> Writer:
        def write(path: Path) -> None:
            writer(path)
            written[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}

        return write

    def manifest(path: Path) -> None:
        content = {"step": step, "files": written, "versions": _versions()}
        path.write_text(json.dumps({**content, "sha256": _check_value(content)}, indent=1) + "\n")

    try:
        if not checkpoints.is_dir():
            disk.make_directory(checkpoints)
            disk.sync(checkpoints.parent)
        if target.exists():  # damaged, or it would have been the one to go on from
            _move_aside(target, disk)
        noting = {name: noted(name, writer) for name, writer in files.items()}
        write_whole(target, {**noting, MANIFEST: manifest}, disk)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(
            f"{target}: the checkpoint could not be written ({reason}); make room, then go on "
            "with --resume from the last complete one"
        ) from None
    return target


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None; a damaged one on the way is named in the log."""
    for path in reversed(_all(checkpoints)):
        try:
            check_checkpoint(path)
        except FormatError as error:
            log.warning("%s; the checkpoint before it is taken", error)
            continue
        return path
    return None


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Hold a checkpoint against its manifest, which is returned.

    Raises:
        FormatError: a file is missing, cut, changed or not spoken of.
    """
    manifest = read_json(path / MANIFEST)
    stated = manifest.pop("sha256", None)
    if stated != _check_value(manifest):
        raise FormatError(
            f"{path / MANIFEST}: does not match its own check value; it is damaged; "
            "expected it as the run wrote it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or directory_of(manifest["step"]) != path.name:
        raise FormatError(
            f"{path / MANIFEST}: is not the manifest of {path.name}; "
            "expected the directory under the name that the run gave it"
        )
    there = {file.name for file in path.iterdir()} - {MANIFEST}
    if there != set(files):
        odd = min(there ^ set(files))
        raise FormatError(
            f"{path}: {odd} is in the manifest or in the directory only; expected it in both"
        )
    for name, entry in files.items():
        file = path / name
        if file.stat().st_size != entry["bytes"] or _digest(file) != entry["sha256"]:
            raise FormatError(
                f"{file}: is not what was written (other bytes); it is damaged; "
                "expected it as the run wrote it"
            )
    return manifest


def rotate(checkpoints: Path, keep: int | None, disk: Disk | None = None) -> None:
    """Remove all but the newest `keep` checkpoints (None: all stay); damaged ones do not count."""
    if keep is None:
        return
    complete = [path for path in _all(checkpoints) if _is_complete(path)]
    for path in complete[: -max(1, keep)]:
        _discard(path, disk or Disk())


def clear_litter(checkpoints: Path) -> None:
    """Remove what a write that was killed left behind."""
    for path in checkpoints.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _all(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_complete(path: Path) -> bool:
    """By names and sizes; the bytes are read when it is needed."""
    try:
        files = read_json(path / MANIFEST)["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (FormatError, OSError, KeyError, TypeError, AttributeError):
        return False


def _move_aside(path: Path, disk: Disk) -> None:
    number = 1
    while (aside := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    log.warning("%s is damaged; it now lies in %s", path, aside.name)
    disk.rename(path, aside)
    disk.sync(path.parent)


def _discard(path: Path, disk: Disk) -> None:
    """Take the name away first, so that no half of it is ever read."""
    gone = path.with_name(f".tmp-{path.name}-old")
    disk.remove(gone)
    disk.rename(path, gone)
    disk.remove(gone)


def _check_value(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    names = ("lorax-finetuning", "torch", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}
