"""What PEFT puts beside an adapter's own tensors: the base's, in copies.

Beside an adapted embedding or head stands its table; where the vocabulary was resized, or
`save_embedding_layers` asks for it, the tables that the adapter leaves alone stand there too; under
bias = "all" and modules_to_save, the same parameter under two or three names. PEFT loads the tables
into the base. So does lorax: an equal one is left out, another one stands in the base's place until
`unload_adapter` puts the base's own back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorax.adapters.attached import adapter_layers, replaced_parameters
from lorax.adapters.config import LoRAConfig
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.variants import resolved, variant_of
from lorax.errors import AdapterError
from lorax.formats.peft_directory import PREFIX
from lorax.formats.safetensors_files import FLOATS
from lorax.formats.vocabulary import table_paths
from lorax.quant.linear import QuantizedLinear


def file_name(model: nn.Module, place: str) -> str:
    """PEFT's name, below its prefix, for the parameter of that path in the adapted model."""
    layer, _, rest = place.partition(".base_layer.")
    if not rest:
        return place
    adapted = model.get_submodule(layer)
    assert isinstance(adapted, AdapterLayer)
    return f"{layer}.{adapted.file_base}.{rest}"


def take_base_copies(
    model: nn.Module, found: dict[str, Tensor], where: str, keep: bool = False
) -> tuple[list[tuple[list[str], Tensor]], dict[str, Tensor]]:
    """Take the base's own tables out of a file's tensors.

    Args:
        model: with the adapter. found: the file's tensors. where: opens a message.
        keep: give equal tables too; the base then has not the number of rows that its files have.

    Returns:
        The tables that differ from the model's, with the places where they belong; and the rest.

    Raises:
        AdapterError: a table of another shape or not finite, two for one tied pair, or a weight
            that the adapter starts inside, of another base.
    """
    layers, rest = adapter_layers(model), dict(found)
    whole = {place for r in replaced_parameters(model) for place in r.places}
    places: dict[int, list[str]] = {}  # by the parameter: a tied pair is one
    copies: dict[int, Tensor] = {}
    for path in dict.fromkeys([*table_paths(model), *layers]):
        layer = layers.get(path)
        place = f"{path}.weight" if layer is None else f"{path}.base_layer.weight"
        if place in whole or (layer is not None and not layer.has_path):
            continue
        copy = rest.pop(PREFIX + file_name(model, place), None)
        if layer is not None and _is_changed(layer):
            if copy is not None:
                _check_copy(layer, path, copy, where)
            continue
        if copy is None and path not in table_paths(model):
            continue
        original = model.get_parameter(place)
        places.setdefault(id(original), []).append(place)
        if copy is not None:
            check_tensor(place, copy, original, where)
            if not torch.equal(copies.setdefault(id(original), copy), copy):
                raise AdapterError(
                    f"{where}: {places[id(original)]} are tied, but differ there; "
                    "expected the same values; get the file anew, or save the adapter again"
                )
    tables = [(places[key], copy) for key, copy in copies.items()]
    if not keep:
        tables = [(to, copy) for to, copy in tables if not _is_equal(model, to[0], copy)]
    return tables, rest


def check_tensor(name: str, tensor: Tensor, expected: Tensor, where: str) -> None:
    """Refuse a file's tensor of another shape, of integers, or with a value that is not finite.

    Raises:
        AdapterError: see above.
    """
    if tensor.shape != expected.shape or tensor.dtype not in FLOATS:
        raise AdapterError(
            f"{where}: {name} is {tuple(tensor.shape)} {tensor.dtype}; "
            f"expected {tuple(expected.shape)}, floating; load it over the base that was trained"
        )
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{where}: {name} is not finite; get the file anew, or train again")


def _is_equal(model: nn.Module, place: str, copy: Tensor) -> bool:
    weight = model.get_parameter(place)
    return torch.equal(copy.to(weight), weight)


def _is_changed(layer: AdapterLayer) -> bool:
    """Whether PEFT holds another weight for the base than lorax does, or none that is dense."""
    return layer.moves_base or isinstance(layer.base_layer, QuantizedLinear)


def _check_copy(layer: AdapterLayer, path: str, copy: Tensor, where: str) -> None:
    weight = layer.stored_base()
    if copy.shape != weight.shape or not _is_same_base(layer, copy.to(weight), weight):
        raise AdapterError(
            f"{where}: {path}.base_layer.weight differs from the model's; "
            "the adapter was trained on another base; load it over that one"
        )


def base_copies(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """The whole tables that PEFT puts beside an adapted embedding and an adapted head.

    It does so where one of the two names below is a target by itself: not for a path that ends in
    it, not for GPT-2's wte alone, and not together with trainable_token_indices.
    """
    layers = adapter_layers(model)
    targets, known = config.target_modules or [], ("embed_tokens", "lm_head")
    if isinstance(targets, str):
        targets = [name.rpartition(".")[2] for name in layers]
    if config.trainable_token_indices or not any(name in targets for name in known):
        return {}
    kind = resolved(variant_of(config).layer)  # of the form that is written, plain or not
    moves = kind is not None and kind.moves_base
    return {
        f"{PREFIX}{name}.base_layer.weight": (
            layers[name].stored_base() if moves else layers[name].base_weight()
        ).clone()
        for name in table_paths(model)
        if name in layers and isinstance(layers[name].base_layer, nn.Linear | nn.Embedding)
    }


def without_wrappers(model: nn.Module, found: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Take out what PEFT writes twice or thrice under bias = "all" and modules_to_save.

    Beside `ln_f.bias` there is the same once more as `ln_f.modules_to_save.bias`, and the base's
    own as `ln_f.original_module.bias`.
    """
    rest = dict(found)
    for replacement in replaced_parameters(model):
        copies = [rest[PREFIX + p] for p in replacement.places if PREFIX + p in rest]
        if not all(torch.equal(copy, copies[0]) for copy in copies):
            raise AdapterError(
                f"{where}: {replacement.places} are tied, but differ there; "
                "expected the same values; get the file anew, or save the adapter again"
            )
        for place in replacement.places:
            module, _, name = (PREFIX + place).rpartition(".")
            again = rest.pop(f"{module}.modules_to_save.{name}", None)
            if again is not None and not torch.equal(again, rest.get(PREFIX + place, again[:0])):
                raise AdapterError(
                    f"{where}: {place} stands there twice, with other values; "
                    "expected the same; get the file anew, or save the adapter again"
                )
            base = rest.pop(f"{module}.original_module.{name}", None)
            original = replacement.original
            if base is not None and not torch.equal(base.to(original), original):
                raise AdapterError(
                    f"{where}: {place} of the base differs from the model's; "
                    "the adapter was trained on another base; load it over that one"
                )
    return rest


def _is_same_base(layer: AdapterLayer, copy: Tensor, weight: Tensor) -> bool:
    """Equal bits; where a decomposition lies between, equal up to rounding."""
    if torch.equal(copy, weight):
        return True
    if not layer.decomposes:
        return False
    size = layer.base_weight().abs().max()
    return bool((copy - weight).abs().max() <= 8 * torch.finfo(weight.dtype).eps * size)
