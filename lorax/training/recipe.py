"""The recipe: what a run is, as a TOML file and as a checked object.

    [model]    which model, in which numbers
    plugins    Python files that register a method, a codebook, a model; beside the recipe
    [adapter]  method = "lora", or another that is registered, and that method's fields
    [data]     which rows, and how long
    [train]    how long, how fast, where to
    [hooks.x]  what the step hook x takes, of those that train.hooks names
    [runtime]  what the command sets for its process

Every key is checked; an unknown one is an error that names the nearest. Any key can be overridden
by its path ("train.learning_rate"). sections.py holds the keys, but for those of the methods.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tomli_w
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
)

from lorax.adapters.config_keys import KEPT, AdapterConfig
from lorax.adapters.variants import UNKNOWN_STEPS, Variant, methods, variant_of
from lorax.errors import AdapterError, FormatError, PluginError, RecipeError
from lorax.files import require
from lorax.formats.toml_files import read_toml
from lorax.plugins import load_plugin
from lorax.text import one_line
from lorax.training.hook_settings import checked_settings
from lorax.training.hooks import check_hooks
from lorax.training.refusals import describe
from lorax.training.sections import (
    DataSection,
    LocalPath,
    ModelSection,
    RuntimeSection,
    Section,
    TrainSection,
)


class AdapterSection(Section):
    """[adapter]: the method, and in the method's own table the fields of its config."""

    method: str


def _fields(variant: Variant) -> dict[str, Any]:
    """The config's fields as pydantic takes them: name -> (type, default)."""
    config: Any = variant.config
    if config is None:
        return {}
    types, left_out = get_type_hints(config), variant.not_in_recipes | variant.unused | KEPT
    fields = {}
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name not in left_out:
            fields[field.name] = (
                types[field.name],
                ... if default is dataclasses.MISSING else default,
            )
    return fields


@cache
def _table_of(variant: Variant) -> Any:
    """The table of a method.

    Raises:
        PluginError: a field of its config is of a type that no recipe has.
    """
    method: dict[str, Any] = {"method": (Literal[variant.name], variant.name)}
    try:
        return create_model(variant.name, __base__=AdapterSection, **method, **_fields(variant))
    except Exception as error:  # annotations are a plugin's own code
        raise PluginError(
            f"variant {variant.name!r}: its config's fields are no keys for a recipe "
            f"({type(error).__name__}: {one_line(error)}); give them types that TOML has, or name "
            "them in not_in_recipes"
        ) from error


def adapter_tables() -> dict[str, Any]:
    """The table that [adapter] is for each method that is registered now."""
    return {name: _table_of(variant) for name, variant in methods().items()}


def _as_adapter(value: Any) -> Any:
    """An [adapter] table as the section of its method.

    Raises:
        RecipeError: no such method, or a key or value that it does not take.
    """
    if not isinstance(value, dict):
        return value
    tables, method = adapter_tables(), value.get("method", "lora")
    if not isinstance(method, str) or method not in tables:
        raise RecipeError(
            f"adapter.method = {repr(method)[:80]}: expected one of {', '.join(tables)}, or a "
            "plugin that registers it (plugins = [FILE])"
        )
    try:
        return tables[method].model_validate(value)
    except ValidationError as error:
        belongs = partial(_method_of, method=method)
        raise RecipeError(describe(error, tables[method], ("adapter",), belongs)) from None


class Recipe(Section):
    """A checked recipe. Build it with `Recipe.load` or `Recipe.from_dict`."""

    plugins: list[LocalPath] = Field(
        default_factory=list,
        description="Python files that are executed first: they register variants and the like.",
    )
    model: ModelSection
    adapter: SerializeAsAny[AdapterSection] = Field(default_factory=lambda: _as_adapter({}))
    data: DataSection
    train: TrainSection
    hooks: dict[str, dict[str, Any]] | None = Field(
        None, description="A table for each step hook: what it takes beside the model."
    )
    runtime: RuntimeSection = RuntimeSection.model_validate({})

    @staticmethod
    def load(
        path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        plugins: Sequence[str | Path] = (),
        *,
        run_plugins: bool = True,
    ) -> Recipe:
        """Read a TOML file; `overrides` are {"train.learning_rate": 1e-4, ...}.

        Args:
            plugins: Python files beside those that the recipe names; all are executed once.
            run_plugins: False executes none, for a recipe that nobody asked for.

        Raises:
            EnvironmentProblem: no such file. RecipeError: no TOML, an unknown key, an impossible
                value, or a feature that is not there. PluginError: a plugin fails.
        """
        path = require(path)
        try:
            values = read_toml(path)
        except FormatError as error:
            raise RecipeError(str(error)) from None
        named = _plugins_of(values, path.parent) + _plugins_of({"plugins": list(plugins)}, Path())
        if named:
            values["plugins"] = list(dict.fromkeys(named))
        return Recipe.from_dict(values, overrides, where=str(path), run_plugins=run_plugins)

    @staticmethod
    def from_dict(
        values: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        where: str = "recipe",
        *,
        run_plugins: bool = True,
    ) -> Recipe:
        """Check a recipe that is given as nested dictionaries; see `load`."""
        merged = copy.deepcopy(dict(values))
        for key, value in (overrides or {}).items():
            _set(merged, key, value)
        named = _plugins_of(merged, Path())
        if named:
            merged["plugins"] = named
        for plugin in named if run_plugins else ():
            load_plugin(plugin)
        try:
            if "adapter" in merged:
                merged["adapter"] = _as_adapter(merged["adapter"])
            recipe = Recipe.model_validate(merged)
            check_hooks(recipe.train.hooks)
            settings = checked_settings(recipe.hooks or {}, recipe.train.hooks)
            recipe = recipe.model_copy(update={"hooks": settings or None})
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        except ValidationError as error:
            raise RecipeError(f"{where}: {describe(error, Recipe)}") from None
        recipe._check_sense(where)
        return recipe

    @property
    def variant(self) -> Variant:
        """The registered variant that [adapter]'s `method` names."""
        return methods()[self.adapter.method]

    @property
    def room(self) -> int | None:
        """How many tokens a packed forward pass has room for; None where rows are padded."""
        return self.train.micro_batch_size * self.data.max_length if self.data.packing else None

    def adapter_config(self, total_steps: int) -> AdapterConfig | None:
        """The [adapter] table as its method's config, for a run of so many optimizer steps.

        Returns:
            None where the method has no adapter.

        Raises:
            RecipeError: a value is impossible, or does not go with that many steps.
        """
        values, variant = dict(self.adapter), self.variant
        del values["method"]
        if variant.config is None:
            return None
        try:
            if variant.from_recipe is not None:
                made = variant.from_recipe(values, total_steps)
            else:
                made = variant.config(**values)
            made.check_start()
            if isinstance(variant.layer, type):  # lorax's own look, without torch
                variant_of(made)
        except AdapterError as error:
            raise RecipeError(f"adapter: {error}") from None
        return made

    def to_toml(self) -> str:
        """The recipe with every default written out; reading it gives the same recipe."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def _check_sense(self, where: str) -> None:
        try:  # the run's length is known once its rows are; until then let there be time enough
            self.adapter_config(self.train.max_steps or UNKNOWN_STEPS)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        refuses = self.variant.refuses
        reason = refuses(self) if refuses is not None else None
        if reason is not None:
            raise RecipeError(f"{where}: {reason}")
        if not self.variant.has_b and self.train.lora_plus_ratio:
            raise RecipeError(
                f"{where}: train.lora_plus_ratio goes with LoRA's A and B; "
                f"adapter.method = {self.adapter.method!r} has none; leave it out"
            )
        if self.train.micro_batch_size > self.train.batch_size:
            raise RecipeError(
                f"{where}: train.micro_batch_size {self.train.micro_batch_size} is larger than "
                f"train.batch_size {self.train.batch_size}; give {self.train.batch_size} or less, "
                "or leave it out"
            )
        self._check_order(where)
        if self.train.early_stopping_patience and not (
            self.data.eval_path or self.data.eval_fraction
        ):
            raise RecipeError(
                f"{where}: train.early_stopping_patience needs rows to evaluate on; give "
                "data.eval_fraction or data.eval_path, and train.eval_steps"
            )
        if self.data.eval_path and self.data.eval_fraction:
            raise RecipeError(f"{where}: give data.eval_path or data.eval_fraction, not both")

    def _check_order(self, where: str) -> None:
        """Grouping goes with what it can help."""
        if self.data.group_by_length and self.data.packing:
            raise RecipeError(
                f"{where}: data.group_by_length saves padding, of which data.packing leaves none; "
                "give one of them"
            )
        if self.data.group_by_length and not self.data.shuffle:
            raise RecipeError(
                f"{where}: data.group_by_length changes the order of the rows, which data.shuffle "
                "= false keeps; give one of them"
            )


def _plugins_of(values: Mapping[str, Any], folder: Path) -> list[str]:
    """The plugins that a recipe names, whole; a path is relative to `folder`."""
    named = values.get("plugins", [])
    if not isinstance(named, list) or not all(isinstance(name, str | Path) for name in named):
        raise RecipeError(f"plugins = {named!r}: expected a list of Python files")
    return [str((folder / Path(name).expanduser()).absolute()) for name in named]


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--{key}: {section} is no table; expected --section.key value")
    values[last] = value


def _method_of(key: str, known: list[str], method: str) -> str | None:
    """Which methods have the key that this one lacks, and what this one takes; None: none has."""
    others = [name for name, table in adapter_tables().items() if key in table.model_fields]
    takes = ", ".join(sorted(set(known) - {"method"})) or "nothing else"
    belongs = f"belongs to method {' and '.join(others)}; "
    return f"{belongs}adapter.method = {method!r} takes {takes}" if others else None
