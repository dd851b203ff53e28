"""A model's files into quantized ones, tensor by tensor: the model is never in memory as a whole.

    source  --read-->  one tensor  --cast, quantize-->  one shard's worth  --write-->  output

What is held at any time is one tensor of the source and the shard that is being filled, so a model
of any size can be quantized in the memory of a shard (5 GB by default, or less as asked). Every
Linear but the head is quantized, as `load_model(quantization=...)` does it, bit for bit; the rest
is cast. The output is what bitsandbytes' own would be: see `lorax.formats.bitsandbytes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorax.data.tokenizer import Tokenizer
from lorax.errors import QuantizationError, UsageError
from lorax.formats import bitsandbytes, gguf_files, tokenizer_files
from lorax.formats.beside import copy_generation, copy_papers, copy_tokenizer
from lorax.formats.directory import check_free, written_directory
from lorax.formats.huggingface import (
    ModelFiles,
    as_dtype,
    open_model_files,
    quantizable,
)
from lorax.formats.safetensors_files import (
    MAX_SHARD_BYTES,
    ShardWriter,
    TensorFiles,
    by_module,
)
from lorax.formats.written_config import write_config
from lorax.quant.quantize import check_request, quantize
from lorax.quant.tensor import QuantizedTensor

Progress = Callable[[int, int, str], None]  # tensors done, of how many, the last one's name


@dataclass(frozen=True)
class QuantizedCopy:
    """What `quantize_model` has done.

    formats: how many Linears have each format. bytes_before and bytes_after: of the model's files,
    without the tokenizer's. bits_per_weight: of the quantized weights, scales included.
    """

    output: str
    formats: dict[str, int]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} Linears as {name}" for name, count in self.formats.items())
        return (
            f"before {self.bytes_before / 1e6:,.1f} MB   after {self.bytes_after / 1e6:,.1f} MB   "
            f"({kinds}; {self.bits_per_weight:.3f} bits a weight)"
        )


def quantize_model(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "nf4-dq",
    *,
    block_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizedCopy:
    """Write a model's copy in 4 or 8 bits, which lorax and transformers + bitsandbytes open.

    Args:
        path: a model directory, a `.gguf` file or a Hub id; not quantized by bitsandbytes already.
        output: a directory; must be missing or empty. The tokenizer's files come along.
        format: "nf4", "nf4-dq", "fp4", "fp4-dq" or "int8" (LLM.int8).
        block_size: values that share a scale: a power of two from 32 to 4096, by default 64; not
            for "int8", whose scales belong to rows.
        dtype: what weights are cast to before they are quantized, and what the others are kept in.
        max_shard_bytes: the largest file to write, which is also what the memory is measured by.
        revision: branch, tag or commit on the Hub.
        progress: is told after each tensor.

    Raises:
        UsageError: an unknown format, block size or dtype, an `output` that is taken, or a source
            that is quantized. QuantizationError: a weight that is not finite, by name.
        FormatError: as in `load_model`. EnvironmentProblem: the disk is full or refuses.
        After any of them nothing is left behind.
    """
    output = Path(output).expanduser()
    _check(output, format, block_size, max_shard_bytes)
    wanted = as_dtype(dtype)
    files = open_model_files(path, revision)
    if isinstance(files.source, bitsandbytes.QuantizedFiles):
        raise UsageError(f"{files.where}: is quantized by bitsandbytes already; give the original")
    wanted = wanted or files.dtype
    tokenizer = _gguf_tokenizer(files)
    counts = _Counts()
    with written_directory(output) as directory:
        writer = ShardWriter(directory, max_shard_bytes)
        for tensors in _quantized(files, format, block_size, wanted, counts, progress):
            writer.add(tensors)
        writer.finish()
        config = write_config(files.model, wanted)
        config["quantization_config"] = bitsandbytes.quantization_config(
            counts.formats, counts.plain, wanted
        )
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        after = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        _bring_tokenizer(files.where, tokenizer, directory)
    bits = 8 * counts.packed_bytes / max(counts.values, 1)
    return QuantizedCopy(str(output), counts.formats, _size(files), after, bits)


def _check(output: Path, format: str, block_size: int | None, max_shard_bytes: int) -> None:
    try:
        check_request(format, block_size, "quantize")
    except QuantizationError as error:
        raise UsageError(str(error)) from None
    if format not in bitsandbytes.FORMATS:
        raise UsageError(
            f"quantize: format {format!r} cannot be written in bitsandbytes' layout; "
            f"expected one of {bitsandbytes.FORMATS}; quantize while loading instead: "
            f"model.quantization = {format!r} in a recipe, or --quantization {format}"
        )
    if max_shard_bytes < 1:
        raise UsageError(f"quantize: max_shard_bytes {max_shard_bytes}; expected at least 1")
    check_free(output)


class _Counts:
    """What has been quantized so far, and what has not."""

    def __init__(self) -> None:
        self.formats: dict[str, int] = {}
        self.plain: list[str] = []
        self.packed_bytes = 0
        self.values = 0

    def quantized(self, weight: QuantizedTensor) -> None:
        self.formats[weight.format] = self.formats.get(weight.format, 0) + 1
        self.packed_bytes += weight.nbytes
        self.values += weight.shape.numel()


def _quantized(
    files: ModelFiles,
    format: str,
    block_size: int | None,
    dtype: torch.dtype,
    counts: _Counts,
    progress: Progress | None,
) -> Iterator[dict[str, Tensor]]:
    """The output's tensors, those of one module together."""
    done = 0
    for group in by_module(files.names):
        tensors: dict[str, Tensor] = {}
        for mine in group:
            tensor = files.read(mine).to(dtype)
            tensors |= _converted(files, mine, tensor, format, block_size, counts)
            del tensor
            done += 1
            if progress is not None:
                progress(done, len(files.names), mine)
        yield tensors
    if files.model.config.tie_word_embeddings:
        counts.plain.append("lm_head")


def _converted(
    files: ModelFiles,
    mine: str,
    tensor: Tensor,
    format: str,
    block_size: int | None,
    counts: _Counts,
) -> dict[str, Tensor]:
    path, _, parameter = mine.rpartition(".")
    module = files.model.get_submodule(path)
    if parameter == "weight" and quantizable(path, module):
        weight = quantize(tensor, format, block_size, name=mine)
        counts.quantized(weight)
        return {f"{path}.{name}": part for name, part in weight.to_bitsandbytes().items()}
    if parameter == "weight" and isinstance(module, nn.Linear):
        counts.plain.append(path)
    tensor = files.model.as_stored(mine, tensor)
    return {mine: tensor.clone()}  # its own memory: what was read may be a part of something larger


def _gguf_tokenizer(files: ModelFiles) -> Tokenizer | None:
    """The tokenizer inside a .gguf file, decoded before any work is done: it may be refused."""
    if isinstance(files.source, gguf_files.GGUFFile):
        return files.source.tokenizer()
    return None


def _bring_tokenizer(where: Path, tokenizer: Tokenizer | None, directory: Path) -> None:
    if tokenizer is not None:
        tokenizer_files.write_tokenizer(tokenizer, directory)
        return
    copy_tokenizer(where, directory)
    copy_papers(where, directory)
    copy_generation(where, directory)


def _size(files: ModelFiles) -> int:
    """Bytes of the files that the source's tensors are in."""
    home = files.source.home if isinstance(files.source, TensorFiles) else {"": files.where}
    return sum(file.stat().st_size for file in set(home.values()))
