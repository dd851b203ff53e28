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

import torch
from torch import nn

from lorax.adapters.inject import replace_module, require_adapter
from lorax.adapters.layer import AdapterLayer
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
    merged = {name: merged_layer(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.merged = merged[name][0]
    dtype = next(iter(layers.values())).base_weight().dtype
    return MergeReport({name: error for name, (_, error) in merged.items()}, dtype)


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
            A head that was tied to the embedding gets a weight of its own, and the config says so;
            so it does where layers gain a bias that they did not have (lora_bias).

    Returns:
        With `merge`, what it cost.

    Raises:
        AdapterError: there is no adapter; or a merged bias has no place in the model's config.
    """
    layers = require_adapter(model)
    gained = _gained_biases(layers) if merge else []
    errors = {}
    for name, layer in layers.items():
        module = layer.base_layer
        if merge:
            merged, errors[name] = merged_layer(layer)
            module = merged.train(layer.training)
        replace_module(model, name, module)
    del model.adapter_config
    if not merge:
        return None
    embedding = str(model.embedding_name).removesuffix(".weight")
    if "lm_head" in errors or embedding in errors:
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)  # type: ignore
    _fill_up_biases(model, gained)
    last = model.get_submodule(next(iter(errors))).weight
    assert isinstance(last, torch.Tensor)
    return MergeReport(errors, last.dtype)


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


# A Llama's config has one word for the biases of all its attention, and one for all of the MLP's.
_BIAS_WORDS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}


def _gained_biases(layers: dict[str, AdapterLayer]) -> list[str]:
    """The layers that merging gives a bias; each must have a word in the config for it."""
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
