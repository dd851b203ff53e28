"""JSON from strangers: bounded, strict, and with errors that name the file.

Numbers of any size are read: who uses a field checks its range and names it. (transformers itself
writes 1000000000000000019884624838656 for "no limit" into tokenizer_config.json.)
"""

import json
from pathlib import Path
from typing import Any

from lorax.errors import FormatError
from lorax.files import read_bounded, why_unreadable

MAX_BYTES = 64 * 2**20  # tokenizer.json of a large vocabulary is 20 MB; a config a few kB
_MAX_DIGITS = 300  # of whole numbers that stay whole: float64 holds those, if not exactly


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, constants: bool = False) -> dict[str, Any]:
    """Read a JSON object; `constants` as in `parse_json`.

    Raises:
        FormatError: the file is missing, no regular file, too large, no UTF-8, no JSON object,
            nested too deep, has a key twice, or holds NaN, an infinity or half a surrogate.
    """
    try:
        text = read_bounded(path, max_bytes).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); give another path, or get the file anew"
        ) from None
    try:
        return parse_json(text, str(path), constants=constants)
    except FormatError as error:
        reason = why_unreadable(path, "")
        if not reason:
            raise
        raise FormatError(f"{path}: no JSON ({reason}); get the file anew") from error


def parse_json(text: str, where: str, *, constants: bool = False) -> dict[str, Any]:
    """Parse a JSON object strictly; `where` names it in errors.

    Args:
        text: the object. A number beyond float64 becomes an infinity.
        where: names it in errors.
        constants: take NaN and Infinity too, which Python's json writes; for files of which only
            texts, flags and token ids are used.

    Raises:
        FormatError: as in `read_json`.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=float if constants else _refuse_constant,
            parse_int=_whole,
        )
        if "\\u" in text:  # only an escape can bring in half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{where}: not valid JSON ({error}); mend it there, or get the file anew"
        ) from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: expected a JSON object, found {type(value).__name__}; get the file anew"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _whole(text: str) -> int | float:
    """Python refuses to read whole numbers of more than 4300 digits, and float() those of 309."""
    return int(text) if len(text) <= _MAX_DIGITS else float(text)
