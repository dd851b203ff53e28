"""Fields of a config that a variant's layer does not compute with: refused by name. No torch.

A researcher's config is mostly made from LoRAConfig, and inherits some twenty fields. Which of them
its layer leaves alone, two rules say:

    unused     the variant names them (variants.py): lora_alpha, where nothing is scaled by it
    a choice   of the inherited config, as use_dora picks DoRA, needs that choice's layer, or one
               made from it; rsLoRA's is LoRA's own

A field at rest asks for nothing: one that has its default.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lorax.adapters.config_files import default_of
from lorax.errors import AdapterError

if TYPE_CHECKING:
    from lorax.adapters.variants import Variant


def check_named(variant: Variant) -> None:
    """Refuse a name among the variant's unused fields that its config does not have.

    Raises:
        AdapterError: the first such name, and the nearest.
    """
    known = [each.name for each in _fields(variant.config)]
    for name in sorted(variant.unused - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise AdapterError(f"variant {variant.name!r}: unused names {name!r}, no field; {hint}")


def check_unused(config: Any, variant: Variant, table: Iterable[Variant]) -> None:
    """Refuse a field that asks for what the variant's layer does not compute.

    config: of the variant's class. table: all variants.

    Raises:
        AdapterError: the first such field and its value.
    """
    for each in _fields(type(config)):
        if each.name in variant.unused and getattr(config, each.name) != default_of(each):
            raise _refusal(config, each.name, variant, "does not use it")
    for choice in table:
        names = _picked_by(config, choice) if _is_inherited(choice, type(config)) else []
        for name in names:
            if not _is_made_from(variant, choice):
                raise _refusal(config, name, variant, f"is no {choice.title}")


def _refusal(config: Any, name: str, variant: Variant, why: str) -> AdapterError:
    found = f"{name} = {getattr(config, name)!r}"
    return AdapterError(f"{found}: {variant.title} (variant {variant.name!r}) {why}; leave it out")


def _is_inherited(choice: Variant, kind: type) -> bool:
    """Whether it is picked by the fields of a class that this one is made from."""
    theirs = choice.config
    return choice.chosen is not None and theirs is not None and theirs in kind.__mro__[1:]


def _is_made_from(variant: Variant, choice: Variant) -> bool:
    mine, theirs = variant.resolved("layer"), choice.resolved("layer")
    return mine is not None and theirs is not None and issubclass(mine, theirs)


def _picked_by(config: Any, choice: Variant) -> list[str]:
    """The fields that make the config this choice's: at rest, they would not."""
    assert choice.chosen is not None
    if not choice.chosen(config):
        return []
    names = []
    for each in _fields(choice.config):
        other = copy.copy(config)
        object.__setattr__(other, each.name, default_of(each))
        if not choice.chosen(other):
            names.append(each.name)
    return names


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind) if kind is not None else ()
