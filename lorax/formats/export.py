"""`lorax export`: what lies at a path, handed over to llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorax.adapters.attached import adapter_layers
from lorax.adapters.merge import unload_adapter
from lorax.adapters.variants import of_file
from lorax.errors import AdapterError, UsageError
from lorax.formats import gguf_adapter, gguf_export
from lorax.formats.gguf_writer import GGUFTensor, check_new
from lorax.formats.instead import instead_of_adapter
from lorax.formats.json_files import read_json
from lorax.formats.open_model import open_model
from lorax.formats.peft_directory import CONFIG
from lorax.formats.places import find_place

FORMATS = {"gguf": tuple(gguf_export.TYPES), "gguf-adapter": gguf_adapter.TYPES}
DEFAULTS = {"gguf": "F16", "gguf-adapter": "F32"}


@dataclass(frozen=True)
class Exported:
    """What was written: how many tensors, and the file's size."""

    path: str
    format: str
    type: str
    tensors: int
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"wrote {self.path}: {self.format}, {self.type}, {self.tensors} tensors, "
            f"{self.nbytes / 1e6:,.1f} MB"
        )


def export(
    path: str | os.PathLike[str],
    output: Path,
    format: str,
    type: str | None = None,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    check_base: bool = True,
    resize_vocabulary: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a model, an adapter merged into its base, or an adapter by itself as GGUF.

    Merging is done in float32 over the weights that the adapter was trained over, and rounded once,
    to the file's type.

    Args:
        path: a model, an adapter or a run's directory, as in `open_model`.
        output: the file; nothing may be there.
        format: "gguf" or "gguf-adapter".
        type: of the matrices; None: F16 for a model, F32 for an adapter.
        base, dtype, device, quantization, check_base, resize_vocabulary, say: as in `open_model`.

    Raises:
        UsageError: no such format or type, `output` is taken, or no adapter where one is asked for.
        AdapterError: an adapter that cannot be merged, or that llama.cpp's file cannot hold. And
        all that `open_model` and `export_model` raise.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    type = DEFAULTS[format] if type is None else type
    gguf_export.check_type(type, FORMATS[format])
    output = output.expanduser()
    check_new(output)
    adapter = find_place(path, base).adapter
    if adapter is not None and format == "gguf":
        variant = of_file(read_json(adapter / CONFIG))
        if variant is not None and variant.no_merge:
            raise AdapterError(f"{adapter / CONFIG}: {variant.no_merge}")
    if adapter is None and format == "gguf-adapter":
        raise UsageError(
            f"{path}: no adapter there, of which a gguf-adapter is made; "
            f"{instead_of_adapter(Path(path).expanduser())}, or take --format gguf"
        )
    model, tokenizer = open_model(
        path,
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        check_base=check_base,
        resize_vocabulary=resize_vocabulary and format == "gguf",
        say=say,
    )
    written: list[GGUFTensor]
    if format == "gguf-adapter":
        written = gguf_adapter.export_adapter(model, output, type)
    else:
        gguf_export.exported_config(model)  # before merging, which takes its time
        if adapter_layers(model):
            gguf_export.decoded_in_float32(model)
            unload_adapter(model, merge=True)
        written = gguf_export.export_model(model, output, tokenizer, type)
    return Exported(str(output), format, type, len(written), output.stat().st_size)
