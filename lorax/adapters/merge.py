"""Merge, unmerge, and what merging costs.

    merged weight = round(W + scaling * B A)

computed in float32 and rounded once to the base's dtype. On a quantized base W is the dequantized
weight and the result stays dense: quantizing it again would throw away most of what was learned
(PEFT does, and moves the logits by 0.1 to 0.26 of their size). The other ways, and what they cost,
are in lorax/merging/routes.py.

The base is never written to. Merging sets a dense Linear beside it; unmerging takes it away.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorax.adapters.attached import replaced_parameters, require_adapter
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.modules_to_save import forget, put_back
from lorax.adapters.tables import is_language_model
from lorax.adapters.trainable_tokens import rows_of, tie_merged
from lorax.errors import AdapterError
from lorax.models.model import Model
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear


@dataclass(frozen=True)
class MergeReport:
    """What rounding the merged weights to the base's dtype cost.

    errors: for each layer, ||rounded - exact|| / ||scaling * B A||: the share of the adapter that
        the rounding moved (0 where the adapter is zero).
    """

    errors: dict[str, float]
    dtype: torch.dtype
    changes: bool = True  # whether the adapter does anything at all

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost most, and how much."""
        return max(self.errors.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        name, error = self.worst
        mean = sum(self.errors.values()) / len(self.errors)
        dtype = str(self.dtype).removeprefix("torch.")
        if not self.changes:
            return f"merged {len(self.errors)} layers in {dtype}: the adapter changes nothing"
        return (
            f"merged {len(self.errors)} layers in {dtype}: rounding moved {mean:.1e} of the "
            f"adapter on average, {error:.1e} at most ({name})"
        )


def merge_adapter(model: nn.Module) -> MergeReport:
    """Fold the adapter into its layers, in place; `unmerge_adapter` takes it out, bit for bit.

    Memory: one dense weight more for each adapted layer, until unmerged or unloaded.

    Raises:
        AdapterError: there is no adapter, it is merged already, or it or what it amounts to is not
            finite. The model is then as it was.
    """
    layers = require_adapter(model)
    if any(layer.merged is not None for layer in layers.values()):
        raise AdapterError("the adapter is merged already; unmerge_adapter(model) undoes it first")
    check_finite(model)
    made = {name: _merged(layer, name) for name, layer in layers.items()}
    merged = {name: module for name, (module, _, _) in made.items()}
    tie_merged(layers, merged)
    for name, layer in layers.items():
        layer.merged = merged[name]
    return MergeReport(
        {name: lost / effect if effect else 0.0 for name, (_, lost, effect) in made.items()},
        next(iter(layers.values())).base_weight().dtype,
        any(effect for _, _, effect in made.values()),
    )


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`: the base gives the same bits as before it, the adapter trains on."""
    layers = require_adapter(model)
    if all(layer.merged is None for layer in layers.values()):
        raise AdapterError("the adapter is not merged; merge_adapter(model) comes first")
    for layer in layers.values():
        layer.merged = None


def unload_adapter(
    model: nn.Module,
    merge: bool = False,
    how: Callable[[str, AdapterLayer], tuple[nn.Module, float]] | None = None,
) -> nn.Module:
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
        The model.

    Raises:
        AdapterError: there is no adapter; it, or what it amounts to, is not finite; or a merged
            bias has no place in the model's config. The model is then as it was.
    """
    layers = require_adapter(model)
    if not merge:
        put_back(model)
        for name, layer in layers.items():
            replace_module(model, name, layer.base_layer)
        del model.adapter_config
        return model
    gained = gained_biases(model, layers)
    check_finite(model)
    if how is None:
        for name, layer in layers.items():  # one at a time, before anything is taken out
            merged_layer(layer, name)
    rows = rows_of(layers)
    for name in list(layers):
        layer = layers.pop(name)  # so that what it held is freed before the next one is made
        merged, _ = merged_layer(layer, name) if how is None else how(name, layer)
        replace_module(model, name, merged.train(layer.training))
    tie_merged(rows, {name: model.get_submodule(name) for name in rows})
    forget(model)
    del model.adapter_config
    if is_language_model(model):
        _say_if_untied(model)
        _fill_up_biases(model, gained)
        model.loaded_from = None
    return model


def check_finite(model: nn.Module) -> None:
    """Refuse an adapter with a tensor that is not finite, before it spreads into the weights.

    Raises:
        AdapterError: the first such tensor.
    """
    tensors = {
        f"{name}.{below}": tensor
        for name, layer in require_adapter(model).items()
        for below, tensor in layer.tensors().items()
    }
    tensors |= {r.places[0]: r.trained for r in replaced_parameters(model)}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{name} is not finite; an adapter like that is not merged"
                "; take an earlier checkpoint, or train anew"
            )


def _say_if_untied(model: Model) -> None:
    """A head that is the embedding no longer must not be written or read as if it were."""
    config = model.config
    head = getattr(model.lm_head, "weight", None)
    embedding = model.get_parameter(model.embedding_name)
    if config.tie_word_embeddings and head is not embedding:
        model.config = dataclasses.replace(config, tie_word_embeddings=False)


def merged_layer(layer: AdapterLayer, name: str = "") -> tuple[nn.Module, float]:
    """The layer as one dense, frozen module, and the share of the adapter lost to rounding.

    Raises:
        AdapterError: a merged weight is not finite, as in a dtype of too small a range.
    """
    module, lost, effect = _merged(layer, name)
    return module, lost / effect if effect else 0.0


def _merged(layer: AdapterLayer, name: str) -> tuple[nn.Module, float, float]:
    """The dense module; ||rounded - exact||; and ||exact - W||, the adapter's effect."""
    dtype = layer.base_weight().dtype
    wide = comparison_dtype(dtype)
    exact = layer.effective_weight(wide)
    effect = effect_of(layer, exact)
    aim = exact if wide == torch.float32 else layer.effective_weight()
    module, lost = rounded_layer(layer, aim, exact, dtype)
    if not math.isfinite(lost):
        raise AdapterError(
            f"{name or 'a layer'}: the merged weight is not finite in "
            f"{str(dtype).removeprefix('torch.')}; take a dtype of a larger range"
        )
    return module, lost, effect


def effect_of(layer: AdapterLayer, exact: Tensor) -> float:
    """||exact - W||; 0 where that is only the rounding of a layer that starts at W up to rounding.

    DoRA's magnitudes are float32 norms, each right to about a last place.
    """
    base = layer.base_weight().to(exact)
    effect = frobenius(exact - base)
    a_place = torch.finfo(torch.float32).eps
    nothing = not layer.starts_exact and effect <= a_place * frobenius(base)
    return 0.0 if nothing else effect


def rounded_layer(
    layer: AdapterLayer, weight: Tensor, exact: Tensor, dtype: torch.dtype
) -> tuple[nn.Module, float]:
    """The layer with `weight` (out, in) rounded to `dtype`, and ||rounded - exact||."""
    module = dense_like(layer.base_layer, weight.to(dtype), layer.effective_bias())
    written = module.weight
    assert isinstance(written, Tensor)
    return module, frobenius(written.to(exact.dtype) - exact)


def comparison_dtype(rounded_to: torch.dtype) -> torch.dtype:
    """What a rounding is measured in: one to float32 in float64, a coarser one in float32."""
    return torch.float64 if rounded_to == torch.float32 else torch.float32


def dense_like(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module like `base`, frozen, with this weight and bias; the bias in the weight's dtype."""
    if isinstance(base, QuantizedLinear):
        module: nn.Module = nn.Linear(base.in_features, base.out_features, False, device="meta")
    else:
        module = copy.copy(base)
        module._parameters = dict(base._parameters)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return module.eval()


def frobenius(x: Tensor) -> float:
    """||x||, accumulated in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


def gained_biases(model: nn.Module, layers: dict[str, AdapterLayer]) -> list[str]:
    """The layers that merging gives a bias.

    Raises:
        AdapterError: one has no word in the config for it, so it cannot be merged.
    """
    gained = [
        name
        for name, layer in layers.items()
        if layer.effective_bias() is not None and layer.base_layer.bias is None
    ]
    words = model.config.bias_words if is_language_model(model) else None
    for name in gained if words is not None else []:
        if name.split(".")[-2:-1] not in ([part] for part in words or ()):
            raise AdapterError(
                f"{name} has no bias, and the model's config no word for one: lora_bias cannot be "
                "merged into it; keep the adapter, or train it without lora_bias there"
            )
    return gained


def _fill_up_biases(model: Model, gained: list[str]) -> None:
    """Say in the config that there are biases, and give the other layers that it means zeros."""
    for part in {name.split(".")[-2] for name in gained}:
        word = {model.config.bias_words[part]: True}
        model.config = dataclasses.replace(model.config, **word)
        for name, module in model.named_modules():
            if name.split(".")[-2:-1] == [part] and getattr(module, "bias", 0) is None:
                dtype = next(model.parameters()).dtype
                size = int(module.out_features)
                device = next(model.parameters()).device
                zeros = torch.zeros(size, dtype=dtype, device=device)
                module.bias = nn.Parameter(zeros, requires_grad=False)
