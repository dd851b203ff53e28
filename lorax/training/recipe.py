"""The recipe: what a run is, as a TOML file and as a checked object.

    [model]    which model, in which numbers
    [adapter]  method = "lora" | "adalora" | "prompt-tuning" | "full", and that method's fields
    [data]     which rows, and how long
    [train]    how long, how fast, where to

Every key is checked; an unknown one is an error that names the nearest. Any key can be overridden
by its path ("train.learning_rate"). What this version does not have yet is refused by name, never
ignored.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_type_hints

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from lorax.adapters.adalora_config import AdaLoRAConfig
from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import KEPT
from lorax.adapters.prompt_config import PromptTuningConfig
from lorax.data.kinds import Column
from lorax.errors import AdapterError, RecipeError, require
from lorax.quant import names


class Section(BaseModel):
    """A table of the recipe: unknown keys are errors, values are fixed once checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the home directory


def _known_format(name: str) -> str:
    """The name of a format, a registered codebook's included."""
    if name not in names.formats():
        expected = names.listed(tuple(map(repr, names.formats())))
        raise PydanticCustomError("format", "Input should be {expected}", {"expected": expected})
    return name


Quantization = Annotated[str, AfterValidator(_known_format)]


class ModelSection(Section):
    """[model]"""

    path: LocalPath
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False


class DataSection(Section):
    """[data]"""

    path: LocalPath
    eval_path: LocalPath | None = None
    columns: dict[Column, str] | None = None
    eval_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    max_length: int = Field(512, ge=2)
    shuffle: bool = True
    packing: bool = False


def _at_most_four_rows(settings: dict[str, Any]) -> int:
    return min(4, settings["batch_size"])


class TrainSection(Section):
    """[train]"""

    output_dir: LocalPath
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    micro_batch_size: int = Field(default_factory=_at_most_four_rows, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, ge=0.0)
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0)
    lora_plus_ratio: float | None = Field(None, gt=0)
    eval_steps: int | None = Field(None, ge=1)
    save_steps: int = Field(100, ge=0)  # 0: only where a signal asks for a checkpoint
    keep_checkpoints: int | None = Field(2, ge=1)
    early_stopping_patience: int = Field(0, ge=0)
    nan_policy: Literal["stop", "skip", "rollback"] = "stop"
    seed: int = Field(0, ge=0, lt=2**32)


# What a method's config has that a recipe does not say: the run or the model does, or the method
# has no use for it.
_NOT_IN_RECIPES = {
    AdaLoRAConfig: {
        "r", "total_step", "rank_pattern",
        "alpha_pattern", "loftq_config", "lora_bias", "use_dora", "use_rslora",
    },
    PromptTuningConfig: {
        "tokenizer_name_or_path", "tokenizer_kwargs",
        "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    },
}  # fmt: skip
_CONFIGS: dict[str, type[LoRAConfig] | type[PromptTuningConfig]] = {
    "lora": LoRAConfig,
    "adalora": AdaLoRAConfig,
    "prompt-tuning": PromptTuningConfig,
}


def _fields(config: Any) -> dict[str, Any]:
    """A config's fields as pydantic takes them: name -> (type, default)."""
    types, left_out = get_type_hints(config), {*_NOT_IN_RECIPES.get(config, ()), *KEPT}
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


def _section(method: str) -> Any:
    fields = _fields(_CONFIGS[method]) if method in _CONFIGS else {}
    return create_model(method, __base__=Section, method=(Literal[method], method), **fields)  # type: ignore


# [adapter]: one table for each method, with the fields of its config; "full" has none.
_SECTIONS: dict[str, Any] = {method: _section(method) for method in (*_CONFIGS, "full")}
AdapterSection: Any = Annotated[Union[tuple(_SECTIONS.values())], Field(discriminator="method")]  # noqa: UP007 - made at run time

# Keys whose feature is not there yet: the values that are accepted, and what the feature is.
_NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "data.packing": ((False,), "packing"),
}


class Recipe(Section):
    """A checked recipe. Build it with `Recipe.load` or `Recipe.from_dict`."""

    model: ModelSection
    adapter: AdapterSection = Field(default_factory=_SECTIONS["lora"])
    data: DataSection
    train: TrainSection

    @staticmethod
    def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a TOML file; `overrides` are {"train.learning_rate": 1e-4, ...}.

        Raises:
            EnvironmentProblem: no such file. RecipeError: no TOML, an unknown key, an impossible
                value, or a feature that is not there.
        """
        path = require(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, deep brackets
            raise RecipeError(f"{path}: not valid TOML ({error})") from None
        return Recipe.from_dict(values, overrides, where=str(path))

    @staticmethod
    def from_dict(
        values: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        where: str = "recipe",
    ) -> Recipe:
        """Check a recipe that is given as nested dictionaries; see `load`."""
        merged = copy.deepcopy(dict(values))
        for key, value in (overrides or {}).items():
            _set(merged, key, value)
        if isinstance(merged.get("adapter"), dict):
            merged["adapter"].setdefault("method", "lora")
        try:
            recipe = Recipe.model_validate(merged)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_describe(error)}") from None
        recipe._refuse_missing_features(where)
        recipe._check_sense(where)
        return recipe

    def adapter_config(self, total_steps: int) -> LoRAConfig | PromptTuningConfig | None:
        """The [adapter] table as its method's config, for a run of so many optimizer steps.

        Returns:
            None where the method is "full": no adapter.

        Raises:
            RecipeError: a value is impossible, or does not go with that many steps.
        """
        values = dict(self.adapter)
        config = _CONFIGS.get(values.pop("method"))
        if config is None:
            return None
        if config is AdaLoRAConfig:
            values["total_step"] = total_steps
        try:
            made = config(**values)
            if isinstance(made, AdaLoRAConfig):
                made.check_that_ranks_fall()
        except AdapterError as error:
            raise RecipeError(f"adapter: {error}") from None
        return made

    def to_toml(self) -> str:
        """The recipe with every default written out; reading it gives the same recipe."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def _refuse_missing_features(self, where: str) -> None:
        for key, (accepted, feature) in _NOT_YET.items():
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if value not in accepted:
                raise RecipeError(
                    f"{where}: {key} = {value!r} asks for {feature}, which this version of lorax "
                    f"does not have; use {accepted[0]!r} or leave the key out"
                )

    def _check_sense(self, where: str) -> None:
        try:  # the run's length is known once its rows are; until then let there be time enough
            self.adapter_config(self.train.max_steps or 2**62)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        if self.adapter.method == "full":
            self._check_full(where)
        if self.adapter.method in ("full", "prompt-tuning") and self.train.lora_plus_ratio:
            raise RecipeError(
                f"{where}: train.lora_plus_ratio goes with LoRA's A and B; "
                f"adapter.method = {self.adapter.method!r} has none"
            )
        if self.train.micro_batch_size > self.train.batch_size:
            raise RecipeError(
                f"{where}: train.micro_batch_size {self.train.micro_batch_size} is larger than "
                f"train.batch_size {self.train.batch_size}; give {self.train.batch_size} or less, "
                "or leave it out"
            )
        if self.train.early_stopping_patience and not (
            self.data.eval_path or self.data.eval_fraction
        ):
            raise RecipeError(
                f"{where}: train.early_stopping_patience needs rows to evaluate on; give "
                "data.eval_fraction or data.eval_path, and train.eval_steps"
            )
        if self.adapter.method == "adalora":
            self._check_adalora(where)
        if self.data.eval_path and self.data.eval_fraction:
            raise RecipeError(f"{where}: give data.eval_path or data.eval_fraction, not both")

    def _check_adalora(self, where: str) -> None:
        """AdaLoRA's ranks settle by the step's number, up to the last one."""
        for key, refused in (("early_stopping_patience", True), ("nan_policy", "rollback")):
            value = getattr(self.train, key)
            if value == refused or (refused is True and value):
                raise RecipeError(
                    f"{where}: train.{key} = {value!r}: AdaLoRA's ranks settle with the step's "
                    "number, which that would leave behind; leave it out"
                )

    def _check_full(self, where: str) -> None:
        """Full fine-tuning moves the weights themselves, by less than 16 bits can hold."""
        if self.model.quantization is not None:
            raise RecipeError(
                f"{where}: model.quantization = {self.model.quantization!r}: a quantized weight is "
                "frozen; adapter.method = 'full' trains every weight, so leave it out"
            )
        if self.model.dtype == "bfloat16":
            raise RecipeError(
                f"{where}: model.dtype = 'bfloat16': its 8 bits lose a step that is 0.4 % of a "
                "weight or less; adapter.method = 'full' trains in float32 ('auto' means that)"
            )


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--{key}: {section} is no table; expected --section.key value")
    values[last] = value


def _describe(error: ValidationError) -> str:
    """One thing that is wrong, in one line; an unknown key first, with its nearest neighbour."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"]]
    method = None
    if place[0] == "adapter" and len(place) > 1:  # pydantic names the method's table too
        method = place.pop(1)
    key = ".".join(place)
    if first["type"] == "union_tag_invalid":
        value = repr(first["input"]["method"])[:80]
        return f"adapter.method = {value}: expected one of {', '.join(_SECTIONS)}"
    if first["type"] == "extra_forbidden":
        known = _keys(place[:-1], method)
        others = [name for name, section in _SECTIONS.items() if place[-1] in section.model_fields]
        if method is not None and others:
            takes = ", ".join(sorted(set(known) - {"method"})) or "nothing else"
            return (
                f"{key} belongs to method {' and '.join(others)}; "
                f"adapter.method = {method!r} takes {takes}"
            )
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known: {known}"
        return f"{key} is an unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if len(place) > 2:  # pydantic names the member of a union too
        key = ".".join(place[:2])
    return f"{key} = {repr(first['input'])[:80]}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(place: list[str], method: str | None) -> list[str]:
    if method is not None:
        return list(_SECTIONS[method].model_fields)
    section: Any = Recipe
    for part in place:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
