"""SmolLM2 with its first layers alone, where a test does not ask how many there are."""

import dataclasses
import os

from torch import nn

LAYERS = int(os.environ.get("LORAX_SMOLLM2_LAYERS", "4"))  # of 30, which `make nightly` takes


def shorten(model, layers=LAYERS):
    """The model with that many of its layers."""
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    model.config = model.model.config = config
    model.model.layers = model.model.layers[:layers]
    return model


def with_few_words(model, rows=4096):
    """The model with the first rows of its embedding and tied head, half of what it computes.

    Whole where all layers are taken.
    """
    if len(model.model.layers) == 30:
        return model
    model.config = model.model.config = dataclasses.replace(model.config, vocab_size=rows)
    weight = model.model.embed_tokens.weight.detach()[:rows].clone()
    model.model.embed_tokens = nn.Embedding.from_pretrained(weight)
    model.lm_head = nn.Linear(*reversed(weight.shape), bias=False)
    model.tie_weights()
    return model
