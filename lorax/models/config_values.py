"""Numbers and flags out of a stranger's config: of the right type, finite, and of a sane size."""

from typing import Any

from lorax.errors import FormatError

_MAX_LAYERS = 10_000  # far above any model; a config from a stranger may ask for anything
_MAX_SIZE = 2**27
_MAX_NUMBER = 1e12


def size(values: dict[str, Any], key: str, where: str, null: int | None = None) -> int:
    """A whole number from 1 on; `null` is what null stands for, where that is allowed."""
    value = values.get(key)
    value = null if value is None else value
    limit = _MAX_LAYERS if key in ("num_hidden_layers", "n_layer") else _MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise FormatError(
            f"{where}: {key} must be a whole number from 1 to {limit}, found {value!r}"
        )
    return value


def number(values: dict[str, Any], key: str, where: str, null: float | None = None) -> float:
    """A positive number up to 1e12; `null` is what null or nothing stands for, where it may."""
    value = values.get(key)
    value = null if value is None else value
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= _MAX_NUMBER
    ):
        raise FormatError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)


def flag(values: dict[str, Any], key: str, where: str) -> bool:
    """True or false."""
    value = values.get(key)
    if not isinstance(value, bool):
        raise FormatError(f"{where}: {key} must be true or false, found {value!r}")
    return value
