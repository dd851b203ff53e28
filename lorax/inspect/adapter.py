"""How large an adapter is, layer by layer, and which way it points: `lorax inspect adapter`."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import Any

from rich.table import Table

from lorax.adapters.arithmetic import Adapter, Size, sizes
from lorax.errors import AdapterError
from lorax.formats.adapter_data import read_adapter


def inspect_adapter(
    path: str | os.PathLike[str], against: str | os.PathLike[str] | None = None
) -> list[Size]:
    """Measure each layer of an adapter's directory, and all of it last.

    Args:
        path: the directory.
        against: another one, of the same base; each line then has the angle to it.

    Raises:
        AdapterError: it is no plain LoRA, or the two have no module, or not its shape, in common.
        FormatError: a directory is incomplete or damaged.
    """
    adapter = read_adapter(path)
    other = None if against is None else read_adapter(against)
    if other is not None:
        _check_comparable(adapter, other, f"{path} and {against}")
    return list(sizes(adapter, other))


def as_dict(found: list[Size]) -> dict[str, Any]:
    """{"layers": [...], "all": {...}}; an angle to nothing is None."""
    rows = [
        {key: None if _is_nan(value) else value for key, value in asdict(size).items()}
        for size in found
    ]
    return {"layers": rows[:-1], "all": rows[-1]}


def table(found: list[Size]) -> Table:
    """A line for each layer, and the whole adapter last; the angles, if there are any."""
    columns = ["layer", "r", "Frobenius", "spectral", "eff. rank"]
    columns += ["degrees"] if any(size.angle is not None for size in found) else []
    made = Table(*columns, box=None)  # room for long paths
    for size in found:
        row = [size.layer, str(size.rank), f"{size.frobenius:.4g}", f"{size.spectral:.4g}"]
        row.append(f"{size.effective_rank:.2f}")
        if size.angle is not None:
            row.append(f"{size.angle:.2f}")
        made.add_row(*row)
    return made


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _check_comparable(one: Adapter, two: Adapter, where: str) -> None:
    common = [name for name in one.layers if name in two.layers]
    if not common:
        raise AdapterError(
            f"{where} adapt no module in common; give two that adapt the same modules"
        )
    for name in common:
        if one.layers[name].shape != two.layers[name].shape:
            shapes = f"{one.layers[name].shape} and {two.layers[name].shape}"
            raise AdapterError(
                f"{where}: {name} is {shapes}; they belong to different bases; "
                "give two adapters of one base"
            )
