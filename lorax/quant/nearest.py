"""The nearest entry of a codebook, found by a table instead of a search.

A binary search over 255 boundaries costs 36 ns a value on a CPU: it can't be vectorized. But the
upper 16 bits of a float32 (sign, exponent, 7 bits of fraction: a bfloat16, rounded towards zero)
already say nearly everything:

    y   s eeeeeeee fffffff|ffffffffffffffff
        \\___ cell, 16 ___/

No codebook here is so fine that two of its boundaries fall into one of the 65,536 cells. So a cell
knows its code but for one comparison, of the lower 16 bits with those of its boundary; and that is
a carry. For y > 0, with `lowest` the code at the cell's lower end and b the boundary's lower bits:

    entry[cell] = lowest * 2^16 + (2^16 - 1 - b)        (b = 2^16 - 1 where there is no boundary)
    code(y)     = (entry[cell] + lower bits of y) >> 16

A negative number's lower bits count downwards, so they are inverted there. One look-up and a few
vectorized integer operations give what the search gives, bit for bit: a tie goes to the lower
entry, NaN to the last. Of the table (256 KiB) values in [-1, 1] touch some 30 KiB. A codebook whose
entries stand in another order (FP4's: that of its bits) is searched in ascending order, and the
place found there is translated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lorax.errors import QuantizationError

CELLS = 2**16


@dataclass(frozen=True)
class NearestTable:
    """A codebook, `values` (k,) float32, and its answers for each cell of float32.

    `entry` is (65536,) int32. `order` (k,) uint8 says where the entries stand in ascending order;
    None where that is their own order.
    """

    values: Tensor
    entry: Tensor
    order: Tensor | None

    def codes(self, y: Tensor) -> Tensor:
        """The indices of the entries nearest to y (any shape, float32): uint8, y's shape."""
        bits = y.view(torch.int32).view(-1)
        places = look_up(self.entry, bits.bitwise_right_shift(16).add_(CELLS // 2))
        lower = bits.bitwise_right_shift(31).bitwise_xor_(bits).bitwise_and_(0xFFFF)
        places = places.add_(lower).bitwise_right_shift_(16).to(torch.uint8)
        if self.order is not None:
            places = self.order.index_select(0, places.int())
        return places.view(y.shape)


def midpoints(code: Tensor) -> Tensor:
    """The boundaries between neighbouring values of a `code` (k,), ascending: (k - 1,) float32.

    Computed in float32, as bitsandbytes does: seven of NF4's lie above the exact midpoint.
    """
    ascending = code.sort().values
    return (ascending[:-1] + ascending[1:]) / 2


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for two tensors of one dimension, on all threads.

    torch looks up rows in parallel, and the entries of one row one by one: a row a thread.
    """
    threads = torch.get_num_threads()
    rows = threads if len(index) % threads == 0 else 1
    return torch.gather(table.expand(rows, len(table)), 1, index.long().view(rows, -1)).view(-1)


def nearest_table(code: Tensor, device: torch.device) -> NearestTable:
    """The table of a codebook (k,) float32 on the CPU, k <= 256; kept for each device.

    Raises:
        QuantizationError: two boundaries of the codebook fall into one cell.
    """
    return _table(code.numpy().tobytes(), device)


@lru_cache(maxsize=16)
def _table(content: bytes, device: torch.device) -> NearestTable:
    values = torch.frombuffer(bytearray(content), dtype=torch.float32)
    boundaries = midpoints(values)
    upper = torch.arange(-CELLS // 2, CELLS // 2, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)  # (2, cells), by magnitude
    ends[1] = torch.where(ends[0].isinf(), ends[0], ends[1])  # arithmetic's NaNs lie further out
    first = torch.bucketize(ends.amin(0), boundaries, out_int32=True)
    last = torch.bucketize(ends.amax(0), boundaries, out_int32=True)
    if (last - first).max() > 1:
        raise QuantizationError(
            "the codebook is too fine: two of its boundaries agree in their upper 16 bits; "
            "expected at most one in each step of bfloat16"
        )
    boundary = torch.cat([boundaries, torch.zeros(1)])[first].view(torch.int32)
    inside = boundary & 0xFFFF
    carry = torch.where(upper < 0, inside, 0xFFFF - inside)
    entry = (first << 16) + torch.where(last > first, carry, 0)
    order = values.argsort(stable=True)
    places = None if torch.equal(order, torch.arange(len(order))) else order.to(torch.uint8)
    return NearestTable(
        values.to(device),
        entry.to(device),
        None if places is None else places.to(device),
    )
