"""What lies at a path that a user gives: a model, or an adapter and where its base is.

a model's directory, .gguf or Hub id        the model
RUN with model/ (full fine-tuning)          the model in there
RUN with adapter/                           that adapter, and its base
an adapter's directory or Hub id            the adapter, and its base
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorax.errors import EnvironmentProblem, FormatError, UsageError
from lorax.formats import bitsandbytes
from lorax.formats.hub import find_adapter_dir, find_model
from lorax.formats.huggingface import open_model_files
from lorax.formats.json_files import read_json
from lorax.formats.peft_directory import CONFIG, find_adapter, is_adapter
from lorax.formats.run_record import is_run, read_record


@dataclass(frozen=True)
class Place:
    """A model, with or without an adapter.

    adapter: its directory, or None. model: the adapter's base or, without one, the model itself,
        as `load_model` takes it.
    """

    adapter: Path | None
    model: str


def find_place(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Place:
    """Look what lies at `path`; `base` wins over the base that an adapter names.

    Raises:
        EnvironmentProblem: there is no such path or Hub id, or no base where the adapter names it.
        UsageError: an adapter that names no base, or a plain model with a `base`.
        FormatError: several adapters lie there.
    """
    local = Path(path).expanduser()
    if not is_run(local) and (local / "model" / "config.json").is_file():
        return _plain(str(local / "model"), base)
    adapter = None if local.suffix == ".gguf" else adapter_directory(path)
    if adapter is None:
        return _plain(os.fspath(path), base)
    return Place(adapter, os.fspath(base) if base is not None else stated_base(adapter))


def adapter_directory(path: str | os.PathLike[str]) -> Path | None:
    """The directory with the adapter's files behind a path or Hub id; None for a plain model.

    Raises:
        EnvironmentProblem: no such path or id. FormatError: several adapters lie there.
    """
    local = find_adapter_dir(path)
    if is_run(local):
        return local / "adapter"
    return find_adapter(local) if local.is_dir() and is_adapter(local) else None


def needed_adapter(path: str | os.PathLike[str]) -> Path:
    """The same, where there must be one.

    Raises:
        FormatError: there is none.
    """
    return adapter_directory(path) or find_adapter(find_adapter_dir(path))


def stated_base(adapter: Path) -> str:
    """The base that an adapter names.

    Raises:
        UsageError: it names none. EnvironmentProblem: the base is not where the adapter says.
    """
    base = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{adapter}: the adapter names no base model; give one with --base")
    try:
        find_model(base)
    except (EnvironmentProblem, FormatError) as error:
        raise type(error)(
            f"{adapter}: the adapter names the base {base!r}: {error}; give its place with --base"
        ) from None
    return base


def as_trained(
    place: Place,
    dtype: str,
    quantization: str | None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, str | None]:
    """dtype and quantization to load the model in: what was asked for, else what is on record.

    Args:
        place: where the model is; without an adapter nothing is on record.
        dtype: "auto" asks for the record; if nothing is there, it stays "auto": config.json's
            dtype, else the file's own.
        quantization: None asks for the record; "none" means plain weights. A base whose files
            are quantized loads as it is.
        say: is told in one line what was taken from the record.
    """
    plain = quantization == "none"
    if place.adapter is None or (dtype != "auto" and quantization is not None):
        return dtype, None if plain else quantization
    record = read_record(place.adapter)
    taken = None
    if quantization is None and record.quantization and not _is_quantized(place.model):
        taken = record.quantization
    told = record.line(taken, record.dtype if dtype == "auto" else "auto")
    if told:
        say(told)
    return record.dtype if dtype == "auto" else dtype, None if plain else quantization or taken


def _plain(path: str, base: str | os.PathLike[str] | None) -> Place:
    if base is not None:
        raise UsageError(
            f"{path}: no {CONFIG} there, and --base {os.fspath(base)} is an adapter's base; "
            "expected an adapter's directory, or leave --base out"
        )
    return Place(None, path)


def _is_quantized(model: str) -> bool:
    """Whether the model's own files are quantized: it then loads as it is."""
    return isinstance(open_model_files(model).source, bitsandbytes.QuantizedFiles)
