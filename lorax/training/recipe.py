"""The recipe: what a run is, as a TOML file and as a checked object.

    [model]    which model, in which numbers
    [adapter]  LoRAConfig's fields
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
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lorax.adapters.config import LoRAConfig
from lorax.errors import AdapterError, RecipeError


class Section(BaseModel):
    """A table of the recipe: unknown keys are errors, values are fixed once checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


# lorax.quant.formats.FORMATS, written out: recipes are checked without loading torch.
Quantization = Literal[
    "nf4",
    "nf4-dq",
    "fp4",
    "fp4-dq",
    "int8",
    "int8-symmetric",
    "int8-affine",
    "int4-symmetric",
    "int4-affine",
]


class ModelSection(Section):
    """[model]"""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False


class DataSection(Section):
    """[data]"""

    path: str
    eval_path: str | None = None
    eval_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    max_length: int = Field(512, ge=2)
    shuffle: bool = True
    packing: bool = False


class TrainSection(Section):
    """[train]"""

    output_dir: str
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    micro_batch_size: int = Field(4, ge=1)
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
    save_steps: int | None = None
    keep_checkpoints: int | None = None
    early_stopping_patience: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)


def _lora_fields() -> dict[str, Any]:
    """LoRAConfig's fields as pydantic takes them: name -> (type, default)."""
    types, plain = get_type_hints(LoRAConfig), LoRAConfig()
    names = [field.name for field in dataclasses.fields(LoRAConfig)]
    return {name: (types[name], getattr(plain, name)) for name in names}


# [adapter]: LoRAConfig's fields, taken from there, and the method.
AdapterSection: Any = create_model(
    "AdapterSection", __base__=Section, method=(str, "lora"), **_lora_fields()
)

# Keys whose feature is not there yet: the values that are accepted, and what the feature is.
_NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter.method": (("lora",), "other methods than lora"),
    "data.packing": ((False,), "packing"),
    "train.save_steps": ((None,), "checkpoints"),
    "train.keep_checkpoints": ((None,), "checkpoints"),
    "train.early_stopping_patience": ((0,), "early stopping"),
}


class Recipe(Section):
    """A checked recipe. Build it with `Recipe.load` or `Recipe.from_dict`."""

    model: ModelSection
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    data: DataSection
    train: TrainSection

    @staticmethod
    def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a TOML file; `overrides` are {"train.learning_rate": 1e-4, ...}.

        Raises:
            RecipeError: no such file, no TOML, an unknown key, an impossible value, or a feature
                that is not there.
        """
        path = Path(path)
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
        try:
            recipe = Recipe.model_validate(merged)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_describe(error)}") from None
        recipe._refuse_missing_features(where)
        recipe._check_sense(where)
        return recipe

    def lora_config(self) -> LoRAConfig:
        """The [adapter] table as LoRAConfig."""
        values = dict(self.adapter)
        del values["method"]
        return LoRAConfig(**values)

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
        try:
            self.lora_config()
        except AdapterError as error:
            raise RecipeError(f"{where}: adapter: {error}") from None
        if self.train.micro_batch_size > self.train.batch_size:
            raise RecipeError(
                f"{where}: train.micro_batch_size {self.train.micro_batch_size} is larger than "
                f"train.batch_size {self.train.batch_size}"
            )
        if self.data.eval_path and self.data.eval_fraction:
            raise RecipeError(f"{where}: give data.eval_path or data.eval_fraction, not both")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--{key}: {section} is no table")
    values[last] = value


def _describe(error: ValidationError) -> str:
    """The first thing that is wrong, in one line; an unknown key with its nearest neighbour."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _keys(place[:-1])
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known: {known}"
        return f"{key} is an unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if len(place) > 2:  # pydantic names the member of a union too
        key = ".".join(place[:2])
    return f"{key} = {repr(first['input'])[:80]}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(place: list[str]) -> list[str]:
    section: Any = Recipe
    for part in place:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
