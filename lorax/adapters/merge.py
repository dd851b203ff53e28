"""Merge, unmerge, and what merging costs.

    merged weight = round(W + scaling * B A)

computed in float32 and rounded once to the base's dtype. On a quantized base W is the dequantized
weight and the result stays dense: quantizing it again would throw away most of what was learned
(PEFT does, and moves the logits by 0.1 to 0.26 of their size).

The base is never written to. Merging sets a dense Linear beside it; unmerging takes it away.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorax.adapters.inject import replace_module, require_adapter
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.replaced import forget, put_back
from lorax.adapters.tokens import tie_merged
from lorax.errors import AdapterError


@dataclass(frozen=True)
class MergeReport:
    """What rounding the merged weights to the base's dtype cost.

    errors: for each layer, ||rounded - exact|| / ||scaling * B A||: the share of the adapter that
        the rounding moved (0 where the adapter is zero).
    """

    errors: dict[str, float]
    dtype: torch.dtype

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most, and how much."""
        return max(self.errors.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        name, error = self.worst
        mean = sum(self.errors.values()) / len(self.errors)
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"merged {len(self.errors)} layers in {dtype}: rounding moved {mean:.1e} of the "
            f"adapter on average, {error:.1e} at most ({name})"
        )


def merge_adapter(model: nn.Module) -> MergeReport:
    """Fold the adapter into its layers, in place; `unmerge_adapter` takes it out, bit for bit.

    Memory: one dense weight more for each adapted layer, until unmerged or unloaded.

    Raises:
        AdapterError: there is no adapter, or it is merged already.
    """
    layers = require_adapter(model)
    if any(layer.merged is not None for layer in layers.values()):
        raise AdapterError("the adapter is merged already")
    merged, errors = _merged(layers)
    for name, layer in layers.items():
        layer.merged = merged[name]
    return MergeReport(errors, next(iter(layers.values())).base_weight().dtype)


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`: the base gives the same bits as before it, the adapter trains on."""
    layers = require_adapter(model)
    if all(layer.merged is None for layer in layers.values()):
        raise AdapterError("the adapter is not merged")
    for layer in layers.values():
        layer.merged = None


def unload_adapter(model: nn.Module, merge: bool = False) -> MergeReport | None:
    """Take the adapter's modules out of the model, in place.

    Args:
        model: a model with an adapter.
        merge: leave the adapter's effect in the weights; a quantized layer then becomes dense.
            What was trained as a whole stays. Where that makes a head differ from the embedding
            that it was tied to, it has a weight of its own, and the config says so. Without
            `merge` the base is as it was loaded.

    Returns:
        With `merge`, what it cost.
    """
    layers = require_adapter(model)
    if not merge:
        put_back(model)
        for name, layer in layers.items():
            replace_module(model, name, layer.base_layer)
        del model.adapter_config
        return None
    merged, errors = _merged(layers)
    for name, layer in layers.items():
        replace_module(model, name, merged[name].train(layer.training))
    forget(model)
    del model.adapter_config
    _say_if_untied(model)
    model.loaded_from = None  # type: ignore[assignment]
    last = model.get_submodule(next(iter(errors))).weight
    assert isinstance(last, torch.Tensor)
    return MergeReport(errors, last.dtype)


def _merged(layers: dict[str, AdapterLayer]) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The dense module of each layer, and what rounding cost it."""
    merged, errors = {}, {}
    for name, layer in layers.items():
        merged[name], errors[name] = merged_layer(layer)
    tie_merged(layers, merged)
    return merged, errors


def _say_if_untied(model: nn.Module) -> None:
    """A head that is the embedding no longer must not be written or read as if it were."""
    config: Any = model.config
    head = getattr(model.lm_head, "weight", None)
    embedding = model.get_parameter(model.embedding_name)  # type: ignore[arg-type]
    if config.tie_word_embeddings and head is not embedding:
        model.config = dataclasses.replace(config, tie_word_embeddings=False)


def merged_layer(layer: AdapterLayer) -> tuple[nn.Module, float]:
    """The layer as one dense, frozen module, and the share of the adapter lost to rounding."""
    base = layer.dense_base()
    assert isinstance(base.weight, torch.Tensor)
    before = base.weight.detach()
    exact = layer.effective_weight()
    weight = exact.to(before.dtype)
    # The exact weight itself is held in float32, so for a float32 base the loss is that of one
    # addition; it is measured against float64 there.
    if before.dtype == torch.float32:
        exact = layer.effective_weight(torch.float64)
    size = (exact - before.to(exact.dtype)).norm().item()
    lost = (weight.to(exact.dtype) - exact).norm().item()
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters)
    merged.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.effective_bias()
    if bias is not None:
        merged.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return merged.eval(), lost / size if size else 0.0
