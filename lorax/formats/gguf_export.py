"""A model as llama.cpp's GGUF file: the inverse of what gguf_files.py reads.

    header | fields: sizes, rotations, tokenizer, chat template | tensors, 32-byte aligned

Matrices are written in the type that is asked for, norms and biases always in F32, as llama.cpp's
own converter does. F32 keeps every bit (but for a last place of Gemma's norms, which have 1 added),
F16 rounds once, and Q8_0 gives 32 neighbours one F16 scale d = max|w| / 127 and 8 bits each. A row
that 32 does not divide is F16 there.

What GGUF has no words for is found by reading: the config that a reader would make of the fields
has to be the model's. So a window, an activation or a stretching that would be lost is refused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorax.adapters.layer import AdapterLayer
from lorax.adapters.tables import embedding_weight
from lorax.data.tokenizer import Tokenizer
from lorax.errors import FormatError, UnsupportedModel, UsageError
from lorax.formats.gguf_files import GGUFFile
from lorax.formats.gguf_layout import (
    KEYS,
    LLAMA3,
    OPTIONAL_KEYS,
    ROPE_FACTORS,
    gguf_name,
    permute,
    permuted_heads,
)
from lorax.formats.gguf_vocabulary import vocabulary_fields
from lorax.formats.gguf_writer import GGUFTensor, check_new, write_gguf
from lorax.models.families import FAMILIES
from lorax.models.llama_config import LlamaConfig, MistralConfig
from lorax.models.model import Model
from lorax.models.rope import inverse_frequencies
from lorax.quant.linear import QuantizedLinear

log = logging.getLogger("lorax")

TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}  # llama.cpp's number for a file of that type
_BLOCK = 32  # values that share a scale in Q8_0
_QUANTIZATION_VERSION = 2
_SAYS_NOTHING = {"original_max_position_embeddings"}  # longrope's; without it nobody asks


def export_model(
    model: Model, path: Path, tokenizer: Tokenizer | None = None, type: str = "F16"
) -> list[GGUFTensor]:
    """Write a model without an adapter as a GGUF file.

    Args:
        model: of a family that lorax reads from GGUF; quantized weights are written decoded.
        path: the file; nothing may be there.
        tokenizer: its vocabulary and chat template come along; None: the file has none.
        type: of the matrices: "F16", "Q8_0" or "F32".

    Returns:
        What tensors were written.

    Raises:
        UnsupportedModel: a family, option or tokenizer that GGUF, or lorax's reader, has no words
            for. UsageError: an adapter is attached, no such type, or `path` is taken.
        FormatError: a weight that F16 cannot hold. EnvironmentProblem: the disk is full or refuses.
    """
    check_type(type)
    check_new(path)
    adapted = [name for name, m in model.named_modules() if isinstance(m, AdapterLayer)]
    if adapted:
        raise UsageError(
            f"{adapted[0]} carries an adapter: unload_adapter(model, merge=True) first, "
            "or export the adapter by itself (gguf-adapter)"
        )
    config = exported_config(model)
    rows = model.get_parameter(model.embedding_name).shape[0]
    fields = _fields(config) | {
        "general.type": "model",
        "general.name": Path(model.name_or_path).name or config.model_type,
        "general.file_type": TYPES[type],
    }
    if type == "Q8_0":
        fields["general.quantization_version"] = _QUANTIZATION_VERSION
    factors = _rope_factors(config)
    _check_read_back(config, fields, factors)
    fields |= vocabulary_fields(tokenizer, rows, str(path))
    tensors = [_tensor(*weight, config, type) for weight in _weights(model)]
    if factors is not None:
        tensors.append(GGUFTensor(ROPE_FACTORS, "F32", tuple(factors.shape), factors.numpy))
    write_gguf(path, layout_of(config).architecture, fields, tensors)
    return tensors


def check_type(type: str, types: tuple[str, ...] = tuple(TYPES)) -> None:
    """Refuse a type that is not written.

    Raises:
        UsageError: see above.
    """
    if type not in types:
        raise UsageError(f"type {type!r}: expected one of {', '.join(types)}")


def exported_config(model: Model) -> LlamaConfig:
    """The config that a GGUF of this model speaks of: a Mistral's is a Llama's there.

    Raises:
        UnsupportedModel: a family that lorax does not read from GGUF.
    """
    config: Any = dataclasses.replace(model.config, tie_word_embeddings=head_is_embedding(model))
    if isinstance(config, MistralConfig):
        config = _as_llama(config)
    if config.gguf is None:
        layouts = {kind: family.config_class.gguf for kind, family in FAMILIES.items()}
        kinds = ["mistral", *(kind for kind, layout in layouts.items() if layout is not None)]
        raise UnsupportedModel(
            f"a {config.model_type} is not written as GGUF; {', '.join(kinds)} are; "
            "keep its Hugging Face directory"
        )
    assert isinstance(config, LlamaConfig)
    return config


def head_is_embedding(model: Model) -> bool:
    """Whether one matrix is both, adapted or not."""
    head = model.lm_head
    head = head.base_layer if isinstance(head, AdapterLayer) else head
    return getattr(head, "weight", None) is embedding_weight(model)


def layout_of(config: LlamaConfig) -> Any:
    """How GGUF holds the family, of which `exported_config` has made sure."""
    assert config.gguf is not None
    return config.gguf


def _as_llama(config: MistralConfig) -> LlamaConfig:
    """llama.cpp calls it a Llama, which has no window: the file is for texts that fit in one."""
    window, positions = config.sliding_window, config.max_position_embeddings
    if window is not None and window < positions:
        log.warning(
            "GGUF has no sliding window for a Mistral: the file's context_length is the window's "
            "%d tokens, within which it computes the same, instead of %d",
            window,
            positions,
        )
        positions = window
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changed = {"sliding_window": None, "max_position_embeddings": positions}
    return LlamaConfig(**(fields | changed))


def _fields(config: LlamaConfig) -> dict[str, Any]:
    """The model's sizes and options under GGUF's names."""
    layout = layout_of(config)
    keys = KEYS | OPTIONAL_KEYS | dict(layout.keys)
    values = {name: getattr(config, key) for name, key in keys.items()}
    values |= {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim,
        "vocab_size": config.vocab_size,
    }
    return {f"{layout.architecture}.{n}": v for n, v in values.items() if v is not None}


def _rope_factors(config: LlamaConfig) -> Tensor | None:
    """By what Llama 3's stretching divides each pair's turn, (D / 2,); None without it."""
    if config.llama3_scaling not in LLAMA3:
        return None
    plain = dataclasses.replace(config, llama3_scaling=None)
    cpu = torch.device("cpu")
    return inverse_frequencies(plain, cpu) / inverse_frequencies(config, cpu)


def _check_read_back(config: LlamaConfig, fields: dict[str, Any], factors: Tensor | None) -> None:
    """Refuse a config of which the fields do not say everything.

    Raises:
        UnsupportedModel: the first such key.
    """
    said = fields | {"general.architecture": layout_of(config).architecture}
    shape = np.array([config.hidden_size, config.vocab_size])
    tensors = {"token_embd.weight": SimpleNamespace(shape=shape)}
    if not config.tie_word_embeddings:
        tensors["output.weight"] = SimpleNamespace(shape=shape)
    if factors is not None:
        tensors[ROPE_FACTORS] = SimpleNamespace(data=factors.numpy())
    found = GGUFFile(Path("the exported file"), said, tensors).config
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(found, field.name)
        if mine != theirs and field.name not in _SAYS_NOTHING:
            raise UnsupportedModel(
                f"{config.model_type}: GGUF has no words for {field.name} = {mine!r:.200} (a "
                f"reader takes {theirs!r:.80}); keep the Hugging Face directory"
            )


def _weights(model: Model) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """The model's tensors: name, shape and what gives it, decoded; a tied head is left out."""
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape), parameter.detach
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            decode = partial(module.quantized.dequantize, torch.float32)
            yield f"{name}.weight", tuple(module.quantized.shape), decode


def _tensor(
    name: str, shape: tuple[int, ...], read: Callable[[], Tensor], config: LlamaConfig, type: str
) -> GGUFTensor:
    """One tensor as it will be written; its values are made when they are asked for."""
    layout = layout_of(config)
    there = gguf_name(name, layout)
    if there is None:
        raise UnsupportedModel(
            f"{config.model_type}: GGUF has no name for the tensor {name}; "
            "keep the Hugging Face directory"
        )
    if len(shape) < 2:
        type = "F32"
    elif type == "Q8_0" and shape[-1] % _BLOCK:
        type = "F16"
    heads = permuted_heads(name, config, layout)

    def values() -> np.ndarray[Any, Any]:
        plain = read().to("cpu", torch.float32)
        if name.endswith("norm.weight"):
            plain = plain + layout.norm_offset
        if heads is not None:
            plain = permute(plain, heads)
        return _encoded(plain.contiguous().numpy(), type, name)

    return GGUFTensor(there, type, shape, values)


def _encoded(values: np.ndarray[Any, Any], type: str, name: str) -> np.ndarray[Any, Any]:
    """float32 -> the type's own numbers, or bytes.

    Raises:
        FormatError: a value that an F16, of numbers or of scales, cannot hold.
    """
    import gguf

    if not np.isfinite(values).all():
        raise FormatError(f"{name} is not finite; get the model anew, or an earlier checkpoint")
    if type == "F32":
        return values
    limit = np.float32(65504) if type == "F16" else np.float32(65504 * 127)
    largest = np.abs(values).max(initial=0)
    if largest > limit:
        raise FormatError(f"{name} has a weight of {largest:g}, which {type} cannot hold; take F32")
    if type == "F16":
        return values.astype(np.float16)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)


def decoded_in_float32(model: nn.Module) -> nn.Module:
    """The model with its weights in float32 and its quantized ones decoded to it: for merging."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.dtype = torch.float32
    return model.float()
