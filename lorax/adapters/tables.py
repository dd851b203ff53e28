"""A model's two tables, embedding and head, where it has them; any nn.Module can be asked.

lorax's models say which parameter is their embedding and whether the head is tied to it. Another
nn.Module (an MLP, a vision tower) says nothing, and then has neither.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from lorax.adapters.layer import AdapterLayer
from lorax.models.model import Model

HEAD = "lm_head"


def is_language_model(model: nn.Module) -> TypeGuard[Model]:
    """Whether this is one of lorax's models, with a config, an embedding and a head."""
    return isinstance(model, Model)


def embedding_path(model: nn.Module) -> str | None:
    """The embedding's path; None where the model names none."""
    name: Any = getattr(model, "embedding_name", None)
    return name.removesuffix(".weight") if isinstance(name, str) else None


def is_tied(model: nn.Module) -> bool:
    """Whether the model's config says that the head is the embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def embedding_weight(model: Model) -> Tensor:
    """The embedding's own weight (vocab, dim), adapted or not: its dtype is the base's."""
    module = model.get_submodule(model.embedding_name.removesuffix(".weight"))
    table = module.base_layer if isinstance(module, AdapterLayer) else module
    assert isinstance(table, nn.Embedding)
    return table.weight
