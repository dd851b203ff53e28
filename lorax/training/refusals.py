"""What pydantic found wrong with a table of a recipe, in one line that names the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError


def describe(
    error: ValidationError,
    table: type[BaseModel],
    place: tuple[str, ...] = (),
    elsewhere: Callable[[str, list[str]], str | None] = lambda key, known: None,
) -> str:
    """One thing that is wrong; an unknown key first, with its nearest neighbour.

    table: what the values were checked as. place: where that table stands in the recipe.
    elsewhere: (an unknown key, the known ones) -> where the key belongs, or None.
    """
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = [*place, *map(str, first["loc"])]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys(table, path[len(place) : -1])
        belongs = elsewhere(path[-1], known)
        if belongs is not None:
            return f"{key} {belongs}"
        near = difflib.get_close_matches(path[-1], known, 1)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known: {known}"
        return f"{key} is an unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if len(path) > max(2, len(place) + 1):  # pydantic names the member of a union too
        key = ".".join(path[: max(2, len(place) + 1)])
    return f"{key} = {repr(first['input'])[:80]}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(table: type[BaseModel], sections: list[str]) -> list[str]:
    found: Any = table
    for section in sections:
        found = found.model_fields[section].annotation
    return list(found.model_fields)
