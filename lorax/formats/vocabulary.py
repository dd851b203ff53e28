"""Embedding and head that came with an adapter's file, and a base of another vocabulary size.

PEFT puts whole tables beside A and B where the vocabulary was resized, where it is told to
(`save_embedding_layers`), and where a table is adapted; reading such a file it loads them into the
base. So does lorax: an equal table is left out, another one stands in the base's place until
`unload_adapter` puts the base's own back.

    <path>.weight                               of a table that the adapter leaves alone
    <path>.base_layer.weight                    of an adapted one
    <path>.token_adapter.base_layer.weight      of one with trained rows
    <path>.original_module.weight               of one that is trained as a whole

Of two sizes the model gets the file's, if asked to: rows that the base has stay, the others are the
file's. That is transformers' resize_token_embeddings, and PEFT's load after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorax.adapters.tables import HEAD, embedding_path, is_tied
from lorax.errors import AdapterError
from lorax.formats.peft_directory import PREFIX

# Under which names a file has a table; the base's own values first.
_ENDS = ("original_module.weight", "token_adapter.base_layer.weight", "base_layer.weight", "weight")


def table_paths(model: nn.Module) -> list[str]:
    """The paths of embedding and head; none of a module that is none of lorax's models."""
    embedding = embedding_path(model)
    return [] if embedding is None else [embedding, HEAD]


def match_vocabulary(
    model: nn.Module, tensors: Mapping[str, Tensor], resize: bool, where: str
) -> Callable[[], None] | None:
    """Give the model, without an adapter yet, the number of rows that the file's tables have.

    Returns:
        What puts the model back, or None where the sizes agree.

    Raises:
        AdapterError: they differ and `resize` is false, or the file has only one of two tables.
    """
    stated = {path: _stated(path, tensors) for path in table_paths(model)}
    tables = {path: table for path, table in stated.items() if table is not None}
    now = {path: len(_weight(model, path)) for path in tables}
    other = [path for path in tables if len(tables[path]) != now[path]]
    if not other:
        return None
    rows = len(tables[other[0]])
    if not resize:
        raise AdapterError(
            f"{where}: its {other[0]} has {rows} rows, the base's {now[other[0]]}: tokens were "
            "added in training; --resize-vocabulary (load_adapter(..., resize_vocabulary=True)) "
            f"gives the base {rows}, or load it over the base that was trained"
        )
    if is_tied(model):
        tables = dict.fromkeys(stated, tables[other[0]])
    if set(tables) != set(stated) or {len(table) for table in tables.values()} != {rows}:
        missing = sorted(set(stated) - set(tables))
        raise AdapterError(
            f"{where}: embedding and head must both be there with {rows} rows to resize the "
            f"vocabulary{'; missing: ' + ', '.join(missing) if missing else ''}; "
            "save the adapter again with both, where it was trained"
        )
    return _resize(model, tables)


def _stated(path: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    for end in _ENDS:
        found = tensors.get(f"{PREFIX}{path}.{end}")
        if found is not None and found.dim() == 2:
            return found
    return None


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    weight = getattr(model.get_submodule(path), "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise AdapterError(
            f"{path} is quantized or adapted; a table of its rows cannot be loaded; load the model "
            "anew, without quantizing its head"
        )
    return weight


def _resize(model: nn.Module, tables: Mapping[str, Tensor]) -> Callable[[], None]:
    config: Any = model.config
    before = {path: _weight(model, path) for path in tables}

    def put(weights: Mapping[str, nn.Parameter], config: Any) -> None:
        for path, weight in weights.items():
            module = model.get_submodule(path)
            module.weight = weight
            size = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
            setattr(module, size, len(weight))
        model.config = config

    resized: dict[int, nn.Parameter] = {}  # a tied pair stays one
    for path, old in before.items():
        if id(old) not in resized:
            kept = old.detach()[: len(tables[path])]
            new = torch.cat([kept, tables[path][len(kept) :].to(kept)])
            resized[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
    rows = len(next(iter(tables.values())))
    put(
        {path: resized[id(old)] for path, old in before.items()},
        dataclasses.replace(config, vocab_size=rows),
    )
    return lambda: put(before, config)
