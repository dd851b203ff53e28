"""A recipe as the command line gives it: a TOML file, and keys by their paths that win over it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorax.cli.plugins import given_plugins
from lorax.errors import FormatError, UsageError

if TYPE_CHECKING:
    from lorax.training.recipe import Recipe

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]  # as *overrides


def read_recipe(path: Path, overrides: tuple[str, ...]) -> Recipe:
    """The checked recipe, with --plugin's files among its plugins."""
    from lorax.training.recipe import Recipe

    return Recipe.load(path, parse_overrides(overrides), given_plugins)


def parse_overrides(tokens: tuple[str, ...]) -> dict[str, Any]:
    """`--section.key value` or `--section.key=value`; values as in TOML, else as text."""
    overrides: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or "." not in key:
            raise UsageError(f"{token}: expected --section.key value, such as --train.epochs 2")
        if not equals:
            if not rest:
                raise UsageError(f"--{key}: its value is missing; write --{key} VALUE")
            value = rest.pop(0)
        overrides[key] = _toml_value(value)
    return overrides


def _toml_value(text: str) -> Any:
    from lorax.formats.toml_files import parse_toml

    try:
        values = parse_toml(f"value = {text}", "value")
    except FormatError:
        return text
    return values["value"] if len(values) == 1 else text
