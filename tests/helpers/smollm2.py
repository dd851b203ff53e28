"""SmolLM2 with its first layers alone, where a test does not ask how many there are."""

import dataclasses
import os

LAYERS = int(os.environ.get("LORAX_SMOLLM2_LAYERS", "4"))  # of 30, which `make nightly` takes


def shorten(model, layers=LAYERS):
    """The model with that many of its layers."""
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    model.config = model.model.config = config
    model.model.layers = model.model.layers[:layers]
    return model
