"""llama.cpp's GGUF: a model and its tokenizer in one file, read through the gguf package.

Names and the order of rows differ from Hugging Face's (gguf_layout.py), Gemma's norms have 1 added,
and Llama 3's stretching of the rotations is stored as the finished factors, not as the four numbers
behind them. Quantized tensors (Q4_1, Q8_0, K-quants ...) are decoded to float32 by the package.
gguf_export.py writes such files.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorax.data.tokenizer import Tokenizer
from lorax.errors import FormatError, UnsupportedModel
from lorax.files import why_unreadable
from lorax.formats.gguf_layout import (
    KEYS,
    LLAMA3,
    OPTIONAL_KEYS,
    ROPE_FACTORS,
    hf_name,
    permuted_heads,
    unpermute,
)
from lorax.formats.gguf_tokenizer import build_tokenizer
from lorax.formats.model_config import read_config
from lorax.models.config import GGUFLayout
from lorax.models.families import FAMILIES, Family
from lorax.models.llama_config import LlamaConfig
from lorax.models.rope import inverse_frequencies

_NOT_COVERED = ("expert_count", "rope.scaling.type")
_ROW_BYTES = 8192  # of a row that is decoded: 16 of them and their values fit the caches
_LONG_FACTORS = "rope_factors_long.weight"


def open_gguf(path: Path) -> GGUFFile:
    """Open a .gguf file.

    Raises:
        FormatError: the file is damaged. UnsupportedModel: another architecture.
    """
    if path.exists() and not path.is_file():  # a FIFO would block
        raise FormatError(
            f"{path}: not a readable GGUF file (it is no regular file); give another path"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lorax.formats.gguf_reader import FastReader

            reader = FastReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader has no error class of its own
        raise FormatError(
            f"{path}: not a readable GGUF file ({why_unreadable(path, repr(error))}); "
            "get the file anew"
        ) from None
    _METADATA.clear()
    _METADATA[_stamp(path)] = fields
    return GGUFFile(path, fields, {tensor.name: tensor for tensor in reader.tensors})


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a .gguf file's metadata; the file that was opened last is not parsed again.

    Raises:
        FormatError: the file is damaged. UnsupportedModel: another architecture, or a kind of
            tokenizer that is not covered.
    """
    fields = _METADATA.get(_stamp(path)) if path.is_file() else None
    return open_gguf(path).tokenizer() if fields is None else build_tokenizer(fields, str(path))


_METADATA: dict[tuple[Any, ...], dict[str, Any]] = {}  # of the file opened last, by its stamp


def _stamp(path: Path) -> tuple[Any, ...]:
    about = path.stat()
    return path, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


class GGUFFile:
    """An open file: its config, its tensors under Hugging Face's names, its tokenizer."""

    def __init__(self, path: Path, fields: dict[str, Any], tensors: dict[str, Any]):
        self.path = path
        self._fields = fields
        self._family, self._layout = self._find_family()
        self._tensors = {
            hf_name(name, self._layout): t for name, t in tensors.items() if name != ROPE_FACTORS
        }
        self.config = self._read_config(tensors.get(ROPE_FACTORS))

    @property
    def names(self) -> list[str]:
        """The tensors' names in a Hugging Face model."""
        return list(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """float32 for what was quantized, else the tensor's own."""
        kind = self._tensors[name].tensor_type.name
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)

    def stored(self, name: str) -> tuple[str, tuple[int, ...], Any]:
        """One tensor as it lies in the file: its type's name, its shape, its bytes."""
        tensor = self._tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return tensor.tensor_type.name, shape, np.ascontiguousarray(tensor.data)

    def read(self, name: str) -> Tensor:
        """One tensor, decoded, its rows in Hugging Face's order."""
        stored = self._tensors[name]
        try:
            values = _decoded(stored.data, stored.tensor_type)
        except Exception as error:  # NotImplementedError for exotic types, ValueError for damage
            kind = stored.tensor_type.name
            raise FormatError(
                f"{self.path}: {name} ({kind}) cannot be decoded ({error}); "
                "get the file anew, or one of another quantization"
            ) from None
        if np.may_share_memory(values, stored.data):
            values = values.copy()  # the file is mapped
        tensor = torch.from_numpy(values.astype(np.float32, copy=False))
        if name.endswith("norm.weight"):
            return tensor - self._layout.norm_offset if self._layout.norm_offset else tensor
        heads = permuted_heads(name, self.config, self._layout)
        if heads is None:
            return tensor
        rows = heads * self.config.head_dim
        if tensor.dim() != 2 or len(tensor) != rows:
            raise FormatError(
                f"{self.path}: {name} has the impossible shape {tuple(tensor.shape)}; "
                f"expected {rows} rows; get the file anew"
            )
        return unpermute(tensor, heads)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file's metadata."""
        return build_tokenizer(self._fields, str(self.path))

    def _field(self, key: str, default: Any = None) -> Any:
        value = self._fields.get(key, default)
        if value is None:
            raise FormatError(
                f"{self.path}: {key} is missing; get the file anew, or convert the model again"
            )
        return value

    def _find_family(self) -> tuple[Family, GGUFLayout]:
        """The family whose config names the file's architecture."""
        architecture = self._field("general.architecture")
        layouts = {f.model_type: f.config_class.gguf for f in FAMILIES.values()}
        for model_type, layout in layouts.items():
            if layout is not None and layout.architecture == architecture:
                return FAMILIES[model_type], layout
        read = ", ".join(layout.architecture for layout in layouts.values() if layout is not None)
        raise UnsupportedModel(
            f"{self.path}: architecture {architecture!r}; {read} are read; "
            "load the model's Hugging Face directory, or take another model"
        )

    def _read_config(self, rope_factors: Any) -> LlamaConfig:
        architecture = self._layout.architecture
        for key in _NOT_COVERED:
            if self._fields.get(f"{architecture}.{key}") not in (None, 0, "none"):
                raise UnsupportedModel(
                    f"{self.path}: {architecture}.{key} is not covered; "
                    "load the model's Hugging Face directory, or take another model"
                )
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise FormatError(f"{self.path}: token_embd.weight must be a matrix; get the file anew")
        values = {key: self._number(f"{architecture}.{name}") for name, key in KEYS.items()}
        for name, key in (OPTIONAL_KEYS | dict(self._layout.keys)).items():
            if f"{architecture}.{name}" in self._fields:
                values[key] = self._number(f"{architecture}.{name}")
        values |= {
            "model_type": self._family.model_type,
            "vocab_size": int(embedding.shape[1]),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        config = read_config(values | self._layout.derived(values), str(self.path))
        assert isinstance(config, LlamaConfig)
        turns = self._fields.get(f"{architecture}.rope.dimension_count", config.head_dim)
        if turns != config.head_dim or _LONG_FACTORS in self._tensors:
            raise UnsupportedModel(
                f"{self.path}: rotations of {turns} of {config.head_dim} values of a head, or "
                f"longrope ({_LONG_FACTORS}), are not covered; load the Hugging Face directory"
            )
        if rope_factors is None:
            return config
        return _with_scaling(config, torch.tensor(rope_factors.data), str(self.path))

    def _number(self, key: str) -> Any:
        """A field; of a float32 the shortest decimal that means the same, which was meant."""
        value = self._field(key)
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _decoded(data: Any, kind: Any) -> Any:
    """Values of (rows, bytes), by the package, whose time goes by calls: 16 rows each.

    Blocks do not cross rows, so several rows, one behind the other, are a longer one.
    """
    import gguf

    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if data.ndim != 2 or block == 1 or not data.flags.c_contiguous:
        return gguf.quants.dequantize(data, kind)
    rows, width = data.shape
    together = math.gcd(rows, 1 << max(0, (_ROW_BYTES // max(width, 1)).bit_length() - 1))
    values = gguf.quants.dequantize(data.reshape(rows // together, together * width), kind)
    return values.reshape(rows, -1)


def _with_scaling(config: LlamaConfig, factors: Tensor, where: str) -> LlamaConfig:
    plain = inverse_frequencies(config, torch.device("cpu"))
    for scaling in LLAMA3:
        scaled = replace(config, llama3_scaling=scaling)
        mine = plain / inverse_frequencies(scaled, torch.device("cpu"))
        if mine.shape == factors.shape and torch.allclose(mine, factors.float(), rtol=1e-4):
            return scaled
    raise UnsupportedModel(
        f"{where}: {ROPE_FACTORS} is neither Llama 3.1's nor Llama 3.2's; "
        "load the model's Hugging Face directory instead"
    )
