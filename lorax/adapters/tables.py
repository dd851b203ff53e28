"""A model's two tables, embedding and head, where it has them; any nn.Module can be asked.

lorax's models say which parameter is their embedding and whether the head is tied to it. Another
nn.Module (an MLP, a vision tower) says nothing, and then has neither.
"""

from __future__ import annotations

from typing import Any

from torch import nn

HEAD = "lm_head"


def is_language_model(model: nn.Module) -> bool:
    """Whether this is one of lorax's models, with a config, an embedding and a head."""
    return hasattr(model, "embedding_name") and hasattr(model, "config")


def embedding_path(model: nn.Module) -> str | None:
    """The embedding's path; None where the model names none."""
    name: Any = getattr(model, "embedding_name", None)
    return name.removesuffix(".weight") if isinstance(name, str) else None


def is_tied(model: nn.Module) -> bool:
    """Whether the model's config says that the head is the embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def head_path(model: nn.Module) -> str | None:
    """The output layer's path; None where the model is no language model."""
    return HEAD if is_language_model(model) else None
