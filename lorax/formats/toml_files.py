"""TOML from strangers: bounded before tomllib sees it.

tomllib keeps every prefix of a dotted key, so that one key of 40,000 parts (80 kB) takes 5 GB and a
minute. A recipe's keys have two parts and its lists one level; what is far beyond is no recipe.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from lorax.errors import FormatError
from lorax.files import as_text, read_bounded

MAX_BYTES = 128 * 2**10  # a recipe is 1 kB; with a rank for each layer 20
MAX_DEPTH = 32  # parts of a dotted key, or brackets inside of brackets
MAX_TABLES = 1000

# Comments and strings, in whose text dots and brackets mean nothing. What has no end is taken to
# the end of its line or of the file, where tomllib stops too.
_TEXTS = re.compile(
    r"""#[^\n]*|"{3}(?:[^\\]|\\.)*?(?:"{3}|\Z)|'{3}.*?(?:'{3}|\Z)"""
    r"""|"(?:[^"\\\n]|\\.)*+(?:"|\Z)?|'[^'\n]*+'?""",
    re.DOTALL,
)
_KEYS = re.compile(r"[\w \t.-]+")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FormatError: it cannot be read, is no TOML, or is larger or deeper than a recipe is.
    """
    try:
        text = as_text(read_bounded(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(
            f"{path}: cannot be read ({reason}); give the path of a TOML file"
        ) from None
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML; `where` names it in errors.

    Raises:
        FormatError: as `read_toml`.
    """
    if len(text) > MAX_BYTES:
        raise FormatError(f"{where}: {len(text)} characters; expected at most {MAX_BYTES}")
    _check_depth(_TEXTS.sub("x", text), where)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, deep brackets
        raise FormatError(
            f"{where}: not valid TOML ({error}); mend it there; texts need quotes, and those with "
            "a backslash single ones"
        ) from None


def _check_depth(bare: str, where: str) -> None:
    """bare: the text without its strings and comments."""
    parts = max((match[0].count(".") + 1 for match in _KEYS.finditer(bare)), default=1)
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", bare):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    tables = len(re.findall(r"^\s*\[", bare, re.MULTILINE))
    for found, limit, what in (
        (parts, MAX_DEPTH, "parts in a dotted key"),
        (deepest, MAX_DEPTH, "brackets inside of brackets"),
        (tables, MAX_TABLES, "tables"),
    ):
        if found > limit:
            raise FormatError(f"{where}: {found} {what}; expected at most {limit}")
