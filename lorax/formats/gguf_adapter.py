"""An adapter as llama.cpp's own file, for `--lora` beside any GGUF of its base.

    adapter.type "lora"    adapter.lora.alpha    for each adapted matrix, under the base's name:
    blk.0.attn_q.weight.lora_a   (r, in)         of an embedding, which is looked up: A^T (vocab, r)
    blk.0.attn_q.weight.lora_b   (out, r)                                             B (dim, r)

llama.cpp adds alpha / r * B A x: one alpha for the file, r of each matrix, which is LoRA's own
scale. Another one (rsLoRA, an alpha_pattern) is s = alpha' / r. Where s r is the same everywhere it
becomes the file's alpha; else the most frequent one does, and the others' B takes the rest, which
is one rounding of float32 (none where it is a power of two).

A file like that holds low-rank matrices and nothing more. What else an adapter may have (DoRA's
magnitudes, trained biases, whole modules, token rows) is refused by name; merged into a model,
`export_model` writes it.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorax.adapters.attached import replaced_parameters, require_adapter
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.merge import check_finite
from lorax.adapters.stated import stated_config
from lorax.adapters.tables import HEAD
from lorax.adapters.variants import variant_of
from lorax.errors import AdapterError, FormatError
from lorax.formats.gguf_export import (
    check_type,
    exported_config,
    head_is_embedding,
    layout_of,
)
from lorax.formats.gguf_layout import gguf_name, permute, permuted_heads
from lorax.formats.gguf_writer import GGUFTensor, check_new, write_gguf
from lorax.models.llama_config import LlamaConfig
from lorax.models.model import Model

TYPES = ("F32", "F16")  # Q8_0 would need ranks that 32 divides
_HELD = {"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"}
_HELD |= {"lora_A", "lora_B", "lora_E"}  # AdaLoRA's, whose E becomes a part of A
_SLACK = 1e-5  # of the weights' norm, for the order of float32 sums
_INSTEAD = "merge it instead: lorax export ADAPTER OUT --format gguf"


def export_adapter(model: Model, path: Path, type: str = "F32") -> list[GGUFTensor]:
    """Write a model's adapter as llama.cpp's adapter file.

    Args:
        model: with the adapter, not merged.
        path: the file; nothing may be there.
        type: of A and B: "F32" or "F16".

    Returns:
        What tensors were written.

    Raises:
        AdapterError: there is no adapter, or it is more than low-rank matrices that llama.cpp adds.
        UnsupportedModel: a family that is not written as GGUF. UsageError: no such type, or `path`
            is taken. FormatError: a value that F16 cannot hold.
        EnvironmentProblem: the disk is full or refuses.
    """
    check_type(type, TYPES)
    check_new(path)
    layers = require_adapter(model)
    config = exported_config(model)
    _check_held(model, layers)
    check_finite(model)
    parts = {name: _low_rank(name, layer) for name, layer in layers.items()}
    parts = {name: part for name, part in parts.items() if len(part[0])}  # AdaLoRA's may be empty
    if not parts:
        raise AdapterError(
            "every rank of the adapter is pruned, so nothing is left to export; train it with a "
            "higher target_r"
        )
    alpha = _common_alpha(parts)
    tensors = []
    for name, (A, B, scaling) in parts.items():
        rest = scaling * len(A) / alpha
        is_table = _is_table(layers[name])
        tensors += _pair(name, A.t() if is_table else A, B * rest, config, type)
    fields = {
        "general.type": "adapter",
        "general.name": Path(model.name_or_path).name or config.model_type,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    write_gguf(path, layout_of(config).architecture, fields, tensors)
    return tensors


def _check_held(model: Model, layers: dict[str, AdapterLayer]) -> None:
    """Refuse what no pair of lora_a and lora_b says, by name.

    Raises:
        AdapterError: the first such part.
    """
    variant = variant_of(stated_config(model))
    if not variant.is_around_modules:
        raise AdapterError(
            f"llama.cpp's adapter file holds low-rank matrices alone, and no {variant.title}; "
            + (variant.no_merge or _INSTEAD)
        )
    for name, layer in layers.items():
        more = [tensor for tensor in layer.tensors() if tensor not in _HELD]
        if more:
            raise AdapterError(
                f"{name} has a {more[0]} ({variant.title}), and llama.cpp's adapter file holds "
                f"low-rank matrices alone; {_INSTEAD}"
            )
    replaced = [place for r in replaced_parameters(model) for place in r.places]
    if replaced:
        raise AdapterError(
            f"{replaced[0]} was trained or brought along as a whole (modules_to_save, bias, a "
            f"saved embedding), which llama.cpp's adapter file does not hold; {_INSTEAD}"
        )
    merged = [name for name, layer in layers.items() if layer.merged is not None]
    if merged:
        raise AdapterError(f"{merged[0]} is merged; unmerge_adapter(model) first")
    if head_is_embedding(model):
        embedding = model.embedding_name.removesuffix(".weight")
        for name in (embedding, HEAD):
            if name in layers:
                raise AdapterError(
                    f"{name} is adapted, and the model's head is its embedding: llama.cpp has one "
                    f"matrix for both and cannot adapt one of them; {_INSTEAD}"
                )


def _low_rank(name: str, layer: AdapterLayer) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r) and the scale, in float32 on the CPU.

    Raises:
        AdapterError: the layer is something else.
    """
    table: Any = layer
    A: Tensor
    B: Tensor
    try:
        if _is_table(layer):
            A, B, scaling = table.lora_embedding_A, table.lora_embedding_B, table.scaling
        else:
            A, B, scaling = layer.low_rank()
    except AdapterError as error:
        raise AdapterError(
            f"{name}: {error}; llama.cpp's adapter file does not hold it; {_INSTEAD}"
        ) from None
    A, B = A.detach().float(), B.detach().float()
    _check_is_all(name, layer, scaling * (B @ A))
    return A.cpu(), B.cpu(), scaling


def _is_table(layer: AdapterLayer) -> bool:
    """Whether it adapts a table of rows, as LoRA on an embedding does."""
    return "lora_embedding_A" in layer.tensors()


def _check_is_all(name: str, layer: AdapterLayer, delta: Tensor) -> None:
    """Refuse a layer, as a researcher's own may be, that is not W + delta up to rounding.

    Raises:
        AdapterError: see above.
    """
    base = layer.base_weight().float()
    delta = delta.t() if _is_table(layer) else delta
    left = (layer.effective_weight() - base - delta).norm()
    if left > _SLACK * (base.norm() + delta.norm()):
        raise AdapterError(
            f"{name}: a {type(layer).__name__} is no low-rank matrix alone, which is what "
            f"llama.cpp's adapter file holds; {_INSTEAD}"
        )


def _common_alpha(parts: dict[str, tuple[Tensor, Tensor, float]]) -> float:
    """The most frequent scale * r that is not zero, as the file's float32 holds it."""
    alphas = Counter(float(np.float32(s * len(A))) for A, _, s in parts.values() if s)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _pair(name: str, A: Tensor, B: Tensor, config: LlamaConfig, type: str) -> list[GGUFTensor]:
    """lora_a and lora_b, with the rows of B in the order of the base's."""
    layout = layout_of(config)
    there = gguf_name(f"{name}.weight", layout)
    if there is None:
        raise AdapterError(f"{name}: GGUF has no name for it; {_INSTEAD}")
    heads = permuted_heads(f"{name}.weight", config, layout)
    B = B if heads is None else permute(B, heads)
    halves = {"lora_a": A.contiguous(), "lora_b": B.contiguous()}
    return [
        GGUFTensor(f"{there}.{half}", type, tuple(t.shape), partial(_values, t, type, name))
        for half, t in halves.items()
    ]


def _values(tensor: Tensor, type: str, name: str) -> np.ndarray[Any, Any]:
    kept = tensor.to(torch.float16 if type == "F16" else torch.float32)
    if not torch.isfinite(kept).all():
        raise FormatError(f"{name}: the adapter has a value that {type} cannot hold; take F32")
    return kept.numpy()
