"""Bytes of a model's weights in each format, and of each optimizer's states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorax.inspect.estimate.setting import Setting
from lorax.inspect.estimate.shape import Shape
from lorax.optim.flat import ALIGNMENT, PAGE_ELEMENTS, round_up
from lorax.quant import names

BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share one, under double quantization
COARSE, SMALL = 256, 4096  # of 8-bit states: values that share a scale; what stays in 32 bits
SCRATCH = 2 * 4 * PAGE_ELEMENTS["cpu"]  # optim/flat.py: a page's parameters and gradients


def quantized_bytes(format: str, rows: int, columns: int) -> int:
    """Of a weight (rows, columns) in that format, scales included."""
    values = rows * columns
    blocks = -(-values // BLOCK)
    if format == names.INT8:
        return values + 4 * rows
    if format in names.AFFINE:
        codes = values if format.startswith("int8") else -(-values // 2)
        return codes + 4 * blocks + (blocks if format.endswith("affine") else 0)
    codes = -(-values // 2)
    if format.endswith("-dq"):
        return codes + blocks + 4 * -(-blocks // NESTED) + 4
    return codes + 4 * blocks


def weight_bytes(shape: Shape, setting: Setting) -> int:
    """Of the base: quantized where the setting says so, else in its dtype."""
    if setting.quantization is None:
        return shape.base * setting.itemsize
    packed = sum(quantized_bytes(setting.quantization, *size) for size in shape.quantizable)
    return packed + shape.plain * setting.itemsize


def state_bytes(optimizer: str, sizes: Sequence[int]) -> int:
    """Of the optimizer's states, for trained tensors of so many values each, with all alignments.

    Pages as optim/flat.py makes them: states of many small tensors lie side by side.
    """
    small = [n for n in sizes if "8bit" not in optimizer or n < SMALL]
    coded = [n for n in sizes if "8bit" in optimizer and n >= SMALL]
    return _paged(small, 1, _floats) + _paged(coded, COARSE, _codes) + 4 * len(sizes)


def _floats(elements: int) -> int:
    return 2 * round_up(4 * elements, ALIGNMENT)


def _codes(elements: int) -> int:
    return 2 * (round_up(elements, ALIGNMENT) + round_up(4 * -(-elements // COARSE), ALIGNMENT))


def _paged(sizes: Sequence[int], align: int, nbytes: Callable[[int], int]) -> int:
    """Bytes of the pages that these tensors fill, in their order."""
    total, filled = 0, 0
    for n in (round_up(size, align) for size in sizes):
        if filled and filled + n > PAGE_ELEMENTS["cpu"]:
            total, filled = total + nbytes(filled), 0
        filled += n
    return total + (nbytes(filled) if filled else 0)


def step_bytes(optimizer: str, sizes: Sequence[int]) -> int:
    """What a step needs besides on a CPU: the scratch, and temporaries of its largest tile.

    adamw_ has two tensors of a tile at a time (sqrt, and one of its products); adamw_8bit_ has m,
    v, the codes' scaled copies, look-ups and masks: seven float32 tensors' worth.
    """
    tile = 4 * min(PAGE_ELEMENTS["cpu"], max(sum(sizes), 1))
    return SCRATCH + tile * (7 if "8bit" in optimizer else 2)
