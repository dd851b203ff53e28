"""Estimates of a recipe, and of one model trained in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from lorax.errors import EnvironmentProblem, UsageError
from lorax.formats.huggingface import as_device
from lorax.inspect.estimate.configs import find_config
from lorax.inspect.estimate.peak import Estimate, estimate
from lorax.inspect.estimate.process import process_bytes
from lorax.inspect.estimate.setting import setting_of, setting_of_recipe
from lorax.training.recipe import Recipe


def estimate_recipe(recipe: Recipe) -> Estimate:
    """What a recipe's run takes: of rows of data.max_length, for the rows are not read.

    Raises:
        EnvironmentProblem, FormatError, UnsupportedModel, AdapterError: as the model and its
            adapter give them.
    """
    known = find_config(recipe.model.path)
    return estimate(known.config, setting_of_recipe(recipe, known))


def estimate_model(
    model: str, choices: Mapping[str, Sequence[Any]], dtype: str = "auto", **settings: Any
) -> list[Estimate]:
    """An estimate for each combination of choices, in their order.

    Args:
        model: as in `find_config`.
        choices: "method", "optimizer", "r", "length" -> values. Full fine-tuning has no rank, and
            stands once.
        dtype: of the weights; "auto": as they are stored.
        settings: what all have in common: see `setting_of`.

    Raises:
        UsageError: an unknown value, or rows that the model's positions do not cover.
        EnvironmentProblem, FormatError, UnsupportedModel, AdapterError: as above.
    """
    known = find_config(model)
    dtype = known.dtype if dtype == "auto" else dtype
    _check_device(str(settings.get("device", "cpu")))
    process = process_bytes() if settings.get("device", "cpu") == "cpu" else 0
    found, seen = [], set()
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        setting = setting_of(dtype=dtype, **chosen, **settings)
        if setting.length > known.config.positions:
            raise UsageError(
                f"--length {setting.length}: the model's positions end at "
                f"{known.config.positions}; give that or less"
            )
        if repr(setting) not in seen:
            found.append(estimate(known.config, setting, process))
        seen.add(repr(setting))
    return found


def _check_device(name: str) -> None:
    """The name of a kind of device, which need not be here."""
    try:
        as_device(name)
    except EnvironmentProblem:
        return
