"""Tensors in safetensors files, one or several with an index, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorax.errors import FormatError
from lorax.files import why_unreadable
from lorax.formats.json_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's default
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What a weight may be stored in; float8 means nothing without scales.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorFiles:
    """The tensors of one or more safetensors files, by name, each read when it is asked for."""

    def __init__(self, files: Iterable[Path]):
        self.home: dict[str, Path] = {}
        for path in files:
            for name in _names(path):
                if name in self.home:
                    raise FormatError(
                        f"{path}: tensor {name} stands in {self.home[name]} too; expected it "
                        "once; get the files anew, or save the model again"
                    )
                self.home[name] = path

    @property
    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self.home)

    def read(self, name: str) -> Tensor:
        """The tensor, as it is stored."""
        return _read(self.home[name], [name])[name]

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, without reading it."""
        with open_file(self.home[name]) as file:
            kind = file.get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise FormatError(
                f"{self.home[name]}: tensor {name} has the unknown dtype {kind}; expected one of "
                f"{', '.join(_DTYPES)}; save the model again as one of them"
            )
        return _DTYPES[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        with open_file(self.home[name]) as file:
            return tuple(file.get_slice(name).get_shape())


def open_file(path: Path) -> Any:
    """safetensors' `safe_open`, for a regular file alone: a FIFO would block."""
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")
    return safe_open(path, framework="pt")


def open_checkpoint(directory: Path, name: str | None = None) -> TensorFiles:
    """Open a model directory's `model.safetensors`, or the shards that its index names.

    name: what the user calls the model, where that is not its directory.

    Raises:
        FormatError: neither is there (pickles are not opened: the message says how to convert
            them), a shard is missing, or a name in the index leaves the directory.
    """
    if (directory / SINGLE).is_file():
        return TensorFiles([directory / SINGLE])
    if not (directory / INDEX).is_file():
        hint = _hint(directory, name or str(directory))
        raise FormatError(f"{directory}: neither {SINGLE} nor {INDEX} is there{hint}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{directory / INDEX}: weight_map must name the tensors' files; get the index anew"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.strip("."):
            raise FormatError(
                f"{directory / INDEX}: {name!r} is not a plain file name; expected that of a file "
                "beside it; get the index anew"
            )
        if not (directory / name).is_file():
            raise FormatError(
                f"{directory / INDEX}: names {name}, which is not there; get that file as well"
            )
    files = TensorFiles(directory / name for name in sorted(set(weight_map.values())))
    if set(files.names) != set(weight_map):
        odd = sorted(set(files.names) ^ set(weight_map))[0]
        raise FormatError(
            f"{directory / INDEX}: tensor {odd} is in the index or in a shard only; expected in "
            "both; get the index and its shards from one save"
        )
    return files


def _hint(directory: Path, name: str) -> str:
    """What to do about pickles, which lorax does not open: they can run any code."""
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    what = f"{pickles[0]} is a pickle" if pickles else "pytorch_model.bin would be a pickle"
    return (
        f"; {what}, which lorax does not open because it can run code. If you trust it, let "
        f"transformers convert it: import transformers as hf; path = {name!r}; "
        "[auto.from_pretrained(path).save_pretrained('converted') "
        "for auto in (hf.AutoModelForCausalLM, hf.AutoTokenizer)]"
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file."""
    return _read(path, _names(path))


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says beside its tensors: text by text."""
    try:
        with open_file(path) as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{path}: not a readable safetensors file ({why_unreadable(path, error)}); "
            "get the file anew"
        ) from None


def write_file(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file; `metadata` gets `format: pt`, which readers ask for."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, which safetensors writes in another one each time.

    So two runs that are equal leave files that are equal, byte for byte.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        values = json.loads(header)
        values["__metadata__"] = dict(sorted(values["__metadata__"].items()))
        # The order of keys is all that may change: tensors stay where they are.
        text = json.dumps({"__metadata__": values.pop("__metadata__"), **values},
                          separators=(",", ":"), ensure_ascii=False).encode()  # fmt: skip
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def write_checkpoint(
    tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index."""
    writer = ShardWriter(directory, max_shard_bytes)
    for names in by_module(tensors):
        writer.add({name: tensors[name] for name in names})
    writer.finish()


def by_module(names: Iterable[str]) -> list[list[str]]:
    """Group the names of one module's tensors, in the order in which the modules come first."""
    groups: dict[str, list[str]] = {}
    for name in names:
        module, weight, _ = name.partition(".weight")  # "P.weight.absmax" is P's as well
        groups.setdefault(module if weight else name.rpartition(".")[0], []).append(name)
    return list(groups.values())


class ShardWriter:
    """Writes tensors as they come, holding one shard at most.

    How many shards there will be is known at the end only, so they get their names in `finish`.
    The tensors of one `add` stay in one shard, however large they are: transformers before version
    5 needs a quantized weight and its scales in the same file.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.tensor_bytes = 0  # written and pending

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take some tensors; writes a shard if they would make it too large."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        pending = sum(tensor.nbytes for tensor in self._pending.values())
        if self._pending and pending + size > self._max_shard_bytes:
            self._flush()
        self._pending |= tensors
        self.tensor_bytes += size

    def finish(self) -> None:
        """Write the last shard and, if there are several, the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._path(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index: dict[str, Any] = {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": weight_map,
        }
        (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _path(self, number: int) -> Path:
        return self._directory / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        write_file(self._pending, self._path(len(self._shards)))
        self._shards.append(list(self._pending))
        self._pending.clear()


def _read(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of one file, which is opened once: its header may be long."""
    found, name = {}, ""
    try:
        with open_file(path) as file:
            for name in names:
                found[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{path}: tensor {name} cannot be read ({error}); get the file anew"
        ) from None
    return found


def _names(path: Path) -> list[str]:
    try:
        with open_file(path) as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{path}: not a readable safetensors file ({why_unreadable(path, error)}); "
            "get the file anew"
        ) from None
