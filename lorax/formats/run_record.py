"""What a training left on record about the base that its adapter stands over.

    RUN/config.toml    [model] quantization and dtype            beside RUN/adapter
    the adapter's own  "quantization" in the fingerprint          wherever the adapter lies

A QLoRA adapter was trained over rounded weights and means those, so whoever loads it takes the
same, unless told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax.errors import FormatError
from lorax.formats import fingerprint
from lorax.formats.json_files import parse_json
from lorax.formats.model_config import DTYPES
from lorax.formats.peft_directory import CONFIG, TENSORS
from lorax.formats.safetensors_files import read_metadata
from lorax.formats.toml_files import read_toml
from lorax.quant import names

RECORD = "config.toml"


@dataclass(frozen=True)
class Record:
    """The base in training.

    quantization: a format or None. dtype: a name or "auto". where: the file that says so, or None.
    """

    quantization: str | None = None
    dtype: str = "auto"
    where: Path | None = None

    def line(self, quantization: str | None, dtype: str) -> str:
        """One line for the user, of what was taken from the record; "" if nothing was."""
        parts = [f"quantized as {quantization}"] if quantization else []
        parts += [f"in {dtype}"] if dtype != "auto" else []
        if not parts:
            return ""
        return f"the base {' and '.join(parts)}, as {self.where} says of the training"


def read_record(adapter: Path) -> Record:
    """What is on record for an adapter's directory: its run's config.toml, else its fingerprint.

    Raises:
        FormatError: a config.toml that is damaged, or that names what does not exist.
    """
    record = adapter.parent / RECORD
    if adapter.name == "adapter" and record.is_file():
        return _from_recipe(record)
    if (adapter / TENSORS).is_file():
        mark = read_metadata(adapter / TENSORS).get(fingerprint.KEY)
        stated = parse_json(mark, f"{adapter / TENSORS}: {fingerprint.KEY}") if mark else {}
        if stated.get("quantization") in names.formats():
            return Record(stated["quantization"], where=adapter / TENSORS)
    return Record()


def _from_recipe(path: Path) -> Record:
    try:
        found: Any = read_toml(path).get("model")
    except FormatError as error:
        raise FormatError(
            f"{error}; expected the run's recipe: mend it, or move the "
            "adapter's directory elsewhere"
        ) from None
    values = found if isinstance(found, dict) else {}
    quantization, dtype = values.get("quantization"), values.get("dtype", "auto")
    if quantization is not None and quantization not in names.formats():
        raise FormatError(
            f"{path}: model.quantization = {quantization!r}; expected one of "
            f"{', '.join(names.formats())}: mend it, or move the adapter's directory elsewhere"
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise FormatError(
            f"{path}: model.dtype = {dtype!r}; expected auto, {', '.join(DTYPES)}: mend it, or "
            "move the adapter's directory elsewhere"
        )
    return Record(quantization, dtype, path)


def is_run(path: Path) -> bool:
    """Whether a run's directory with an adapter in it."""
    return (path / "adapter" / CONFIG).is_file()
