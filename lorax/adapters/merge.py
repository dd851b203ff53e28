"""Merge, unmerge, and what merging costs.

    merged weight = round(W + scaling * B A)

computed in float32 and rounded once to the base's dtype. On a quantized base W is the dequantized
weight and the result stays dense: quantizing it again would throw away most of what was learned
(PEFT does, and moves the logits by 0.1 to 0.26 of their size). The other ways, and what they cost,
are in routes.py; `take_route` takes one of them.

The base is never written to. Merging sets a dense Linear beside it; unmerging takes it away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorax.adapters import routes
from lorax.adapters.inject import require_adapter
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.replaced import forget, put_back
from lorax.adapters.tokens import TokenRows, tie_merged
from lorax.errors import AdapterError
from lorax.models.replace import replace_module
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear


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
    merged, errors = {}, {}
    for name, layer in layers.items():
        merged[name], errors[name] = merged_layer(layer)
    tie_merged(layers, merged)
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


def unload_adapter(
    model: nn.Module,
    merge: bool = False,
    how: Callable[[str, AdapterLayer], tuple[nn.Module, float]] | None = None,
) -> MergeReport | None:
    """Take the adapter's modules out of the model, in place.

    Args:
        model: a model with an adapter.
        merge: leave the adapter's effect in the weights; a quantized layer then becomes dense.
            What was trained as a whole stays. Where that makes a head differ from the embedding
            that it was tied to, it has a weight of its own, and the config says so; so it does
            where layers gain a bias that they did not have (lora_bias). Without `merge` the base
            is as it was loaded.
        how: a layer's path and the layer -> what takes its place, and the share that this loses;
            `merged_layer` if not given.

    Returns:
        With `merge`, what it cost.

    Raises:
        AdapterError: there is no adapter; or a merged bias has no place in the model's config.
    """
    layers = require_adapter(model)
    if not merge:
        put_back(model)
        for name, layer in layers.items():
            replace_module(model, name, layer.base_layer)
        del model.adapter_config
        return None
    gained = gained_biases(layers)
    errors = {}
    rows = {name: layer for name, layer in layers.items() if isinstance(layer, TokenRows)}
    for name in list(layers):
        layer = layers.pop(name)  # so that what it held is freed before the next one is made
        merged, errors[name] = merged_layer(layer) if how is None else how(name, layer)
        replace_module(model, name, merged.train(layer.training))
    tie_merged(rows, {name: model.get_submodule(name) for name in rows})
    forget(model)
    del model.adapter_config
    _say_if_untied(model)
    _fill_up_biases(model, gained)
    model.loaded_from = None  # type: ignore[assignment]
    first = model.get_submodule(next(iter(errors)))
    weight = first if isinstance(first, QuantizedLinear) else first.weight
    assert isinstance(weight.dtype, torch.dtype)
    return MergeReport(errors, weight.dtype)


def _say_if_untied(model: nn.Module) -> None:
    """A head that is the embedding no longer must not be written or read as if it were."""
    config: Any = model.config
    head = getattr(model.lm_head, "weight", None)
    embedding = model.get_parameter(model.embedding_name)  # type: ignore[arg-type]
    if config.tie_word_embeddings and head is not embedding:
        model.config = dataclasses.replace(config, tie_word_embeddings=False)


def merged_layer(layer: AdapterLayer) -> tuple[nn.Module, float]:
    """The layer as one dense, frozen module, and the share of the adapter lost to rounding."""
    dense = routes.Route(layer.base_weight().dtype)
    routed = routes.route_layer("", layer, dense)
    return routed.module, routed.cost.share


def take_route(
    model: nn.Module, route: routes.Route, original: routes.Original | None = None
) -> tuple[dict[str, routes.LayerCost], dict[str, tuple[Tensor, Tensor]]]:
    """Merge the adapter by this route and take its modules out, in place, layer by layer.

    Args:
        model: with an adapter.
        route: the route; all that is dense comes out in its dtype.
        original: where the weights from before quantization are; for the routes that want them.

    Returns:
        What each adapted layer lost, and the residuals (A, B), both by path.

    Raises:
        AdapterError: there is no adapter. QuantizationError: a merged weight is not finite, and the
            model is then merged in part.
    """
    costs: dict[str, routes.LayerCost] = {}
    residuals: dict[str, tuple[Tensor, Tensor]] = {}
    adapted = set(require_adapter(model))
    others = [name for name in routes.routed_modules(model, route) if name not in adapted]

    def merged(name: str, layer: nn.Module) -> tuple[nn.Module, float]:
        routed = routes.route_layer(name, layer, route, original)
        if routed.residual is not None:
            residuals[name] = routed.residual
        costs[name] = routed.cost
        return routed.module, routed.cost.share

    for name in others:
        replace_module(model, name, merged(name, model.get_submodule(name))[0])
        del costs[name]
    unload_adapter(model, merge=True, how=merged)
    model.to(route.dtype)
    for module in model.modules():  # those that stay quantized are decoded to that dtype too
        if isinstance(module, QuantizedLinear):
            module.dtype = route.dtype
            if isinstance(module.quantized, FourBitTensor):
                module.quantized = dataclasses.replace(module.quantized, dtype=route.dtype)
    return costs, residuals


# A Llama's config has one word for the biases of all its attention, and one for all of the MLP's.
_BIAS_WORDS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}


def gained_biases(layers: dict[str, AdapterLayer]) -> list[str]:
    """The layers that merging gives a bias.

    Raises:
        AdapterError: one has no word in the config for it, so it cannot be merged.
    """
    gained = [
        name
        for name, layer in layers.items()
        if layer.effective_bias() is not None and layer.base_layer.bias is None
    ]
    for name in gained:
        if name.split(".")[-2:-1] not in ([word] for word in _BIAS_WORDS):
            raise AdapterError(
                f"{name} has no bias, and the model's config no word for one: lora_bias cannot be "
                "merged into it; keep the adapter, or train it without lora_bias there"
            )
    return gained


def _fill_up_biases(model: nn.Module, gained: list[str]) -> None:
    """Say in the config that there are biases, and give the other layers that it means zeros."""
    for part in {name.split(".")[-2] for name in gained}:
        word = {_BIAS_WORDS[part]: True}
        model.config = dataclasses.replace(model.config, **word)  # type: ignore
        for name, module in model.named_modules():
            if name.split(".")[-2:-1] == [part] and getattr(module, "bias", 0) is None:
                dtype = next(model.parameters()).dtype
                size = int(module.out_features)
                device = next(model.parameters()).device
                zeros = torch.zeros(size, dtype=dtype, device=device)
                module.bias = nn.Parameter(zeros, requires_grad=False)
