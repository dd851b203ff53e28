"""The table of variants: what each kind of adapter says about itself. No torch.

Everything else asks this table and names no variant: `add_adapter`, the recipe's [adapter], the dry
run, the card, files, fingerprints, merging, `inspect adapter` and `verify`. A variant is one file,
lorax's own or a researcher's, with a config, a layer and one call:

    lorax.register_variant(
        Variant("vera", config=VeRAConfig, layer=VeRALinear, title="VeRA",
                summary=lambda config: f"VeRA of rank {config.r}")
    )

There are two kinds. A *method* has a config of its own: its name is what a recipe's adapter.method
says, and the config's peft_type is what its files say. A *choice* (`chosen` is given) is picked by
the fields of a method's config, as use_dora picks DoRA: the one registered last that says yes.

What a layer computes, its class says (layer.py); here stands what is asked without a layer. Layers
and hooks may be given as "module:name" and are imported when they are needed, so that recipes are
checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.unused import check_named, check_unused
from lorax.errors import AdapterError

# lorax's own files that register something; those of the choices import torch.
_METHODS = ("plain", "adalora.config", "prompt.config", "full")
_CHOICES = ("pissa", "loftq", "dora")

UNKNOWN_STEPS = 2**62  # a run's optimizer steps, for `from_recipe`, while its rows are not known


@dataclass(frozen=True)
class Variant:
    """What a variant says about itself.

    name: of a method, the recipe's adapter.method. config: its class; None: there is no adapter.
    title: its name for people. summary: of a config, in one line, for the dry run and the card.
    layer, embedding: the AdapterLayer around a Linear and around an Embedding; None: not covered.
    chosen: whether these fields of a config pick it; None for a method.
    unused: fields of the config, inherited ones mostly, that the layer does not compute with: no
        keys of a recipe, and refused in a config or a file unless they have their defaults.

    In a recipe:
    not_in_recipes: fields of the config that the run or the model gives.
    from_recipe: (values, optimizer steps) -> config; the config's class by default.
    refuses: a recipe -> why it cannot be run, or None. has_b: whether lora_plus_ratio has a B.
    hook: model -> training's StepHook, what it adds to each step.
    trains_base: the run leaves a model, trained in float32, and no adapter.

    In the model:
    add, insert: (model, config, tokenizer) and (model, config), for what stands elsewhere than
        around a module; `add` starts anew, `insert` waits for a file's tensors.

    In files:
    in_peft: whether PEFT opens its directory and computes the same.
    tags: the card's, beside "lorax".
    saving: a config -> what to say in the log when it is saved, or None.

    Why not, for people, "" where it can be:
    no_merge: in `lorax merge`. no_verify: in `lorax verify`. no_matrix: as a low-rank matrix that
    can be added and measured. no_matrix_alone: the same, of a file without its base.
    """

    name: str
    config: type[AdapterConfig] | None
    title: str
    summary: Callable[[Any], str]
    layer: str | type | None = None
    embedding: str | type | None = None
    chosen: Callable[[Any], bool] | None = None
    unused: frozenset[str] = frozenset()
    not_in_recipes: frozenset[str] = frozenset()
    from_recipe: Callable[[dict[str, Any], int], AdapterConfig] | None = None
    refuses: Callable[[Any], str | None] | None = None
    has_b: bool = True
    hook: str | Callable[[Any], Any] | None = None
    trains_base: bool = False
    add: str | Callable[..., None] | None = None
    insert: str | Callable[..., None] | None = None
    in_peft: bool = False
    tags: tuple[str, ...] = ()
    saving: Callable[[Any], str | None] | None = None
    no_merge: str = ""
    no_verify: str = ""
    no_matrix: str = ""
    no_matrix_alone: str = ""

    @property
    def peft_type(self) -> str | None:
        """What a file says it is."""
        return getattr(self.config, "peft_type", None)

    def resolved(self, name: str) -> Any:
        """What this field gives, imported where it is an import path."""
        return resolved(getattr(self, name))

    @property
    def is_around_modules(self) -> bool:
        """Whether it wraps modules that the config's target_modules pick."""
        return self.layer is not None


_table: dict[str, Variant] = {}


def register_variant(variant: Variant) -> None:
    """Add a variant, in this process.

    Raises:
        AdapterError: its name, or its config's peft_type, is taken by another one; or it lacks a
            layer or a config, or a field that `unused` names.
    """
    if variant.config is not None and not variant.config.__module__.startswith("lorax."):
        variants()  # lorax's own have their names first
    import_module("lorax.adapters.plain")  # LoRA's own come first, whoever is imported first
    there = _table.get(variant.name)
    if there is not None:
        raise AdapterError(f"variant {variant.name!r} is there already; take another name")
    if variant.config is None and not variant.trains_base:
        raise AdapterError(f"variant {variant.name!r} has no config; give a dataclass")
    if variant.config is not None and variant.layer is None and variant.insert is None:
        raise AdapterError(
            f"variant {variant.name!r} has neither a layer nor an insert function; give one of them"
        )
    if variant.layer is not None and not hasattr(variant.config, "selects"):
        raise AdapterError(
            f"variant {variant.name!r} wraps modules, and its config does not say which; make it "
            "from lorax.LoRAConfig"
        )
    for other in _table.values() if variant.chosen is None else ():
        if other.chosen is None and variant.peft_type and other.peft_type == variant.peft_type:
            raise AdapterError(
                f"variant {variant.name!r}: peft_type {variant.peft_type!r} is {other.name}'s; "
                "give its config a peft_type of its own"
            )
    check_named(variant)
    _table[variant.name] = variant


def methods() -> dict[str, Variant]:
    """The methods by their names, as a recipe's adapter.method takes them."""
    _import(_METHODS)
    own = {name: _table[name] for name in ("lora", "adalora", "prompt-tuning", "full")}
    return own | {name: v for name, v in _table.items() if v.chosen is None}


def variants() -> dict[str, Variant]:
    """All variants by their names, methods and choices."""
    _import(_METHODS + _CHOICES)
    return dict(_table)


def variant_of(config: Any) -> Variant:
    """The variant that a config asks for.

    Raises:
        AdapterError: it is of a class that nobody registered, or a field asks for what the variant
            does not compute.
    """
    mine = [v for v in variants().values() if v.config is type(config)]
    for variant in reversed(mine):
        if variant.chosen is not None and variant.chosen(config):
            return variant
    for variant in mine:
        if variant.chosen is None:
            check_unused(config, variant, _table.values())
            return variant
    raise AdapterError(
        f"{type(config).__name__} is the config of no variant; expected one of "
        f"{', '.join(v.config.__name__ for v in methods().values() if v.config)}, or "
        "lorax.register_variant(...) first"
    )


def of_file(values: Mapping[str, Any]) -> Variant | None:
    """The method whose files have this adapter_config.json; None if nobody registered it."""
    kinds = {v.peft_type: v for v in methods().values() if v.config is not None}
    kind = values.get("peft_type")
    return kinds.get(kind) if isinstance(kind, str) else None


def needed_of_file(values: Mapping[str, Any], where: str) -> Variant:
    """`of_file`, of which there must be one.

    Raises:
        AdapterError: there is none; the message says which there are.
    """
    found = of_file(values)
    if found is None:
        known = ", ".join(v.peft_type for v in methods().values() if v.peft_type)
        raise AdapterError(
            f"{where}: peft_type {values.get('peft_type')!r}; expected one of {known}, or what "
            "a plugin registers (--plugin FILE)"
        )
    return found


def resolved(what: Any) -> Any:
    """What an import path "module:name" names; anything else as it is."""
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    return getattr(import_module(module), name)


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        import_module(f"lorax.adapters.{name}")
