"""Names of an adapter's config against the paths of a model's modules, by PEFT's rules.

Most entries are plain names ("q_proj", "layers.0.mlp.up_proj"); those are matched here. A regular
expression is a program of a stranger's, and is matched in bounded time (expressions.py).
"""

from __future__ import annotations

import functools
import re

_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")

Groups = tuple[str | None, ...]


def is_plain(expression: str) -> bool:
    """Whether it is made of words and dots (a bare dot stands for any character)."""
    return _PLAIN.fullmatch(expression) is not None


def matches_whole(expression: str, name: str) -> bool:
    """`re.fullmatch`."""
    return _groups(expression, name, True, is_plain(expression)) is not None


def matches_end(expression: str, name: str) -> bool:
    """Whether it matches a path, or its end behind a dot: PEFT's rule for rank_pattern."""
    return _groups(rf"(.*\.)?({expression})$", name, False, is_plain(expression)) is not None


def matches_module(expression: str, name: str) -> bool:
    """Whether it matches some parts of a path: PEFT's rule for modules_to_save."""
    whole = rf"(^|.*\.){expression}($|\..*)"
    return _groups(whole, name, False, is_plain(expression)) is not None


def number_behind(expression: str, name: str) -> int | None:
    """The number that stands behind the part of a path that it matches: PEFT's layers_pattern."""
    whole = rf"(?:^|.*?\.){expression}\.(\d+)\."
    found = _groups(whole, name, False, is_plain(expression) or expression == r"[^.]*")
    return int(str(found[-1])) if found is not None else None  # the expression may have groups


@functools.lru_cache(maxsize=2**14)
def _groups(expression: str, name: str, full: bool, plain: bool) -> Groups | None:
    """The groups of `re.fullmatch` or `re.match`; None where there is no match."""
    if not plain:
        from lorax.adapters.expressions import groups

        return groups(expression, name, full)
    pattern = _compiled(expression)
    match = pattern.fullmatch(name) if full else pattern.match(name)
    return None if match is None else match.groups()


_compiled = functools.lru_cache(maxsize=2**12)(re.compile)  # re's own cache holds 512
