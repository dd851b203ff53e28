"""What an adapter trains of the model itself: whole parameters, each in a copy put in its place.

    modules_to_save = ["lm_head"]     every parameter of the modules whose path ends like that
    bias = "lora_only" or "all"       the biases of the adapted layers, or every bias

    module.weight ---- trained, in the module          original, held in `Replacement`
                 \\___ swapped by disabled_adapter, put back by unload_adapter ___/

No module is wrapped, so no path changes, and the base is never written to. The copy has its
original's dtype, as PEFT's has: over a bfloat16 base it trains in bfloat16, where small steps are
lost to rounding. A parameter that two modules share (tied embeddings) is replaced where it is
named and stays as it is elsewhere: that unties the two. With `ensure_weight_tying` one copy stands
in both places.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from lorax.adapters.attached import replaced_parameters
from lorax.adapters.config import LoRAConfig
from lorax.adapters.tables import HEAD, embedding_path, is_tied
from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear

log = logging.getLogger("lorax")

# The names by which PEFT knows an embedding or a head that may be tied.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


@dataclass
class Replacement:
    """A parameter of the base and the copy that is trained in its stead.

    places: the parameter's paths in the adapted model; several where one copy stays tied.
    trains: whether the copy is trained with the adapter; a table that came with a file is not.
    """

    places: list[str]
    original: nn.Parameter
    trained: nn.Parameter
    trains: bool = True

    def is_in_place(self, model: nn.Module) -> bool:
        """Whether the model computes with the copy now."""
        return model.get_parameter(self.places[0]) is self.trained

    def put(self, model: nn.Module, trained: bool) -> None:
        """Let the model compute with the copy, or with the original."""
        parameter = self.trained if trained else self.original
        if parameter.device != self.trained.device:  # the model has moved, the original has not
            parameter.data = parameter.data.to(self.trained.device)
        for place in self.places:
            module, _, name = place.rpartition(".")
            setattr(model.get_submodule(module), name, parameter)


def replace_parameters(model: nn.Module, groups: list[list[str]]) -> None:
    """Put a trainable copy in the place of each parameter; `groups` as `find_parameters` gives."""
    replacements = []
    for places in groups:
        original = model.get_parameter(places[0])
        trained = nn.Parameter(original.detach().clone())
        replacements.append(Replacement(places, original, trained))
    for replacement in replacements:
        replacement.put(model, trained=True)
    if replacements:
        model.__dict__["_replaced_parameters"] = replacements


def put_table(model: nn.Module, places: list[str], table: Tensor) -> None:
    """Let this table, which is not trained, stand in the place of the base's own."""
    original = model.get_parameter(places[0])
    copy = nn.Parameter(table.to(original, copy=True), requires_grad=False)
    replacement = Replacement(places, original, copy, trains=False)
    replacement.put(model, trained=True)
    model.__dict__["_replaced_parameters"] = [*replaced_parameters(model), replacement]


def put_back(model: nn.Module) -> None:
    """Let the originals stand where they stood."""
    for replacement in replaced_parameters(model):
        replacement.put(model, trained=False)
    forget(model)


def forget(model: nn.Module) -> None:
    """Keep whatever stands in the model now, frozen, and drop the other of each pair."""
    for replacement in replaced_parameters(model):
        replacement.trained.requires_grad_(False)
    model.__dict__.pop("_replaced_parameters", None)


def find_parameters(
    model: nn.Module, config: LoRAConfig, adapted: Collection[str]
) -> list[list[str]]:
    """Which parameters the config has trained as a whole, before any adapter is put in.

    Args:
        model: without an adapter.
        config: its modules_to_save, bias and ensure_weight_tying.
        adapted: the paths of the modules that get a layer of their own.

    Returns:
        The paths of each copy's places, as they are once the layers are in.

    Raises:
        AdapterError: a module is quantized, adapted too, or has nothing to train.
    """
    saved = _saved_modules(model, config, adapted)
    groups = []
    for name, module in saved.items():
        for below, _ in module.named_parameters(remove_duplicate=False):
            groups.append([f"{name}.{below}"])
    if config.ensure_weight_tying:
        groups = _tied(model, config, adapted, groups)
    taken = {place for places in groups for place in places}
    if config.bias != "none":
        if config.init_lora_weights == "loftq":
            raise AdapterError(
                f"bias is {config.bias!r}: LoftQ computes with a copy of the base; 'none' goes "
                "with "
                "it; leave bias out"
            )
        groups += [[place] for place in _biases(model, config, adapted) if place not in taken]
    return groups


def _saved_modules(
    model: nn.Module, config: LoRAConfig, adapted: Collection[str]
) -> dict[str, nn.Module]:
    """The modules of modules_to_save by PEFT's rule: the path ends in the name, dot or not."""
    modules = {name: module for name, module in model.named_modules() if name}
    names = config.modules_to_save or []
    saved = {n: m for n, m in modules.items() if any(n.endswith(wanted) for wanted in names)}
    for name, module in saved.items():
        quantized = [n for n, m in module.named_modules() if isinstance(m, QuantizedLinear)]
        if quantized:
            path = ".".join(part for part in (name, quantized[0]) if part)
            raise AdapterError(
                f"modules_to_save: {path} is quantized, and codes cannot be trained; load the "
                "base without quantization, or adapt it by target_modules"
            )
        if next(module.parameters(), None) is None:
            raise AdapterError(
                f"modules_to_save: {name} has no parameters; name a module that has some"
            )
        for other in (*adapted, *saved):
            if (other == name and other in adapted) or other.startswith(name + "."):
                raise AdapterError(
                    f"modules_to_save: {name} is trained as a whole, and {other} in it once more; "
                    "name one of them"
                )
    return saved


def _tied(
    model: nn.Module, config: LoRAConfig, adapted: Collection[str], groups: list[list[str]]
) -> list[list[str]]:
    """With ensure_weight_tying: one copy in the embedding's and in the head's place."""
    embedding = embedding_path(model)
    if embedding is None or not is_tied(model):
        log.warning("ensure_weight_tying: the model's head is not tied; it changes nothing here")
        return groups
    pair = [f"{embedding}.weight", f"{HEAD}.weight"]
    if {embedding, HEAD} & set(adapted):
        raise AdapterError(
            "ensure_weight_tying: one LoRA for embedding and head together is not covered; name "
            "them in modules_to_save, or leave ensure_weight_tying out"
        )
    if not any(name.split(".")[-1] in EMBEDDING_NAMES for name in config.modules_to_save or []):
        return groups
    return [pair, *(places for places in groups if places[0] not in pair)]


def _biases(model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> list[str]:
    places = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        module, _, parameter = name.rpartition(".")
        if parameter != "bias":
            continue
        if module in adapted:
            places.append(f"{module}.base_layer.bias")
        elif config.bias == "all":
            places.append(name)
    return places
