"""Prompt tuning: virtual tokens in front of the text (Lester et al. 2021, arXiv:2104.08691).

    tokens              p_1 ... p_n   t_1 ... t_T          p (n, C) trained, embeddings of no word
    positions           0   ... n-1   n   ... n+T-1
    hidden states       cut off       (B, T, C)

Nothing else is trained: n * C numbers. The model sends the embeddings of its first tokens through
its `prefix` (lorax/models/model.py), and that is where the prompt stands. With a cache it is put
in front once, at the start. p is float32 and cast to the base's dtype where it is put in.

It can not be merged: no weight of the model holds its inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorax.adapters.attached import attach_config
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.prompt.config import PromptTuningConfig as PromptTuningConfig
from lorax.errors import AdapterError
from lorax.models.model import Body, Model, Prefix


class Encodes(Protocol):
    """A tokenizer, as far as a prompt asks for one."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""


class PromptTuning(AdapterLayer):
    """Stands in a model's `prefix` and puts n trained embeddings in front of the tokens'.

    Args:
        base: the prefix that stood there.
        places: n.
        width: the model's, C.
        device: the model's.
    """

    has_path = False

    def __init__(self, base: nn.Module, places: int, width: int, device: torch.device):
        super().__init__(base)
        self.prompt_embeddings = nn.Parameter(torch.zeros(places, width, device=device))

    @property
    def length(self) -> int:
        """The places that the prompt takes: none while it is switched off."""
        return self.prompt_embeddings.shape[0] if self.enabled else 0

    @property
    def device(self) -> torch.device:
        """Where the prompt lives."""
        return self.prompt_embeddings.device

    def adapted(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, n + T, C)."""
        prompt = self.prompt_embeddings.to(x.dtype)  # (n, C)
        return torch.cat([prompt.expand(x.shape[0], -1, -1), x], dim=1)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The prompt."""
        return {"prompt_embeddings": self.prompt_embeddings}

    def dense_base(self) -> nn.Module:
        """There is none; asked for in order to merge, it says why that does not work."""
        raise AdapterError(
            "a tuned prompt can not be merged: it is an input, and no weight of the model holds it"
            "; keep it as an adapter"
        )


def add_prompt(
    model: nn.Module, config: PromptTuningConfig, tokenizer: Encodes | None = None
) -> None:
    """Put a prompt into the model, in place; afterwards it alone requires gradients.

    Raises:
        AdapterError: the prompt leaves no position for a token, the config is another model's, or
            it starts as a text and there is no tokenizer. The model is then as it was.
    """
    start = _start(model, config, tokenizer)
    insert_prompt(model, config)
    with torch.no_grad():
        prompt_layer(model).prompt_embeddings.copy_(start)


def insert_prompt(model: nn.Module, config: PromptTuningConfig) -> None:
    """As `add_prompt`, with a prompt of zeros that waits for its values."""
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise AdapterError("the model has an adapter already; unload_adapter(model) first")
    config = _with_sizes(model, config)
    assert config.token_dim is not None
    room = _language_model(model).max_positions
    if config.num_virtual_tokens >= room:
        raise AdapterError(
            f"num_virtual_tokens {config.num_virtual_tokens} leaves no position for a token: "
            f"the model has {room}; give fewer"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    device = _embedding(model).weight.device
    body = _body(model)
    base = body.prefix
    assert isinstance(base, Prefix)
    layer = PromptTuning(base, config.num_virtual_tokens, config.token_dim, device)
    body.prefix = layer.train(model.training)
    attach_config(model, config)


def prompt_layer(model: nn.Module) -> PromptTuning:
    """The model's prompt."""
    prefix = _body(model).prefix
    if not isinstance(prefix, PromptTuning):
        raise AdapterError(
            "the model has no tuned prompt"
            "; add_adapter(model, config) with a PromptTuningConfig comes first"
        )
    return prefix


def _start(model: nn.Module, config: PromptTuningConfig, tokenizer: Encodes | None) -> Tensor:
    """What the prompt is at first: (n, C) float32."""
    embedding = _embedding(model)
    count = config.num_virtual_tokens
    device = embedding.weight.device
    if config.prompt_tuning_init == "RANDOM":
        return torch.randn(count, embedding.weight.shape[1], device=device)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(0, embedding.weight.shape[0], (count,), device=device)
        return _body(model).scaled(embedding.weight.detach()[ids]).float()
    if tokenizer is None:
        raise AdapterError(
            "prompt_tuning_init = 'TEXT' needs the model's tokenizer: "
            "add_adapter(model, config, tokenizer)"
        )
    assert config.prompt_tuning_init_text is not None
    words = tokenizer.encode(config.prompt_tuning_init_text)
    if not words:
        raise AdapterError("prompt_tuning_init_text has no token; give a text with some words")
    if max(words) >= embedding.weight.shape[0]:
        raise AdapterError(
            f"prompt_tuning_init_text has token {max(words)}, but the model's embedding has "
            f"{embedding.weight.shape[0]} rows; give the tokenizer of this model"
        )
    ids = torch.tensor((words * (count // len(words) + 1))[:count], device=device)
    return _body(model).scaled(embedding.weight.detach()[ids]).float()


def _with_sizes(model: nn.Module, config: PromptTuningConfig) -> PromptTuningConfig:
    """The config with the model's sizes written in, as PEFT writes them."""
    sizes = _language_model(model).config.sizes
    found: dict[str, Any] = {
        "token_dim": sizes.width,
        "num_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
    }
    for key, value in found.items():
        if getattr(config, key) not in (None, value):
            raise AdapterError(
                f"{key} is {getattr(config, key)}, but the model's is {value}: "
                "the prompt belongs to another model; give the model that it was trained on"
            )
    return dataclasses.replace(config, **found, num_transformer_submodules=1)


def _language_model(model: nn.Module) -> Model:
    if not isinstance(model, Model):
        kind = type(model).__name__
        raise AdapterError(
            f"prompt tuning is for language models; {kind} is none of lorax's"
            "; give a model that lorax loaded"
        )
    return model


def _body(model: nn.Module) -> Body:
    """The part of the model that has the prefix."""
    return _language_model(model).body


def _embedding(model: nn.Module) -> nn.Embedding:
    name = _language_model(model).embedding_name.rpartition(".")[0]
    embedding = model.get_submodule(name)
    assert isinstance(embedding, nn.Embedding)
    return embedding
