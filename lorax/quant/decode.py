"""The four-bit decoder for speed on a CPU: the fast twin of `blockwise.dequantize_blockwise`.

One look-up in a table of all 256 bytes decodes a byte, both values at once, as one 64-bit entry:

    byte  [c0 | c1]   ->   table (256,) int64   [values[c1] | values[c0]], two float32

The values lie in a float32 buffer then, are scaled there, and are rounded once into the output. The
look-ups of a chunk are laid out as a row a thread, because torch looks up rows in parallel, and the
entries of one row one by one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorax.backend import uses_compiled
from lorax.quant import codebooks, compiled
from lorax.quant.blockwise import number_of_blocks, scale_blocks_
from lorax.quant.nearest import look_up

DECODE_ELEMENTS = 2**20  # measured best on two cores: few parallel regions, a buffer of 4 MiB


def decode_into(
    out: Tensor, packed: Tensor, scales: Tensor, block_size: int, quant_type: str
) -> None:
    """Decode into out (n,), contiguous and of any floating dtype.

    Args:
        packed: (ceil(n / 2),) uint8, the earlier code in the high nibble.
        scales: (ceil(n / block_size),) float32.
        quant_type: the codebook's name.
    """
    done = 0
    if uses_compiled(out):
        done = compiled.decode_into(out, packed, scales, block_size, quant_type)
    if done < len(out):
        table = _pair_table(quant_type, out.device)
        _look_up_into(
            out[done:], packed[done // 2 :], table, scales[done // block_size :], block_size
        )


def code_values(packed: Tensor, quant_type: str) -> Tensor:
    """The codebook's values, not scaled: packed (m,) uint8 -> (2 m,) float32."""
    return look_up(_pair_table(quant_type, packed.device), packed).view(torch.float32)


@cache
def _pair_table(quant_type: str, device: torch.device) -> Tensor:
    """For each byte its two float32 values as one 64-bit entry: (256,) int64."""
    code = codebooks.four_bit(quant_type)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # (256, 2)
    return pairs.to(device).view(torch.int64).flatten()


def _look_up_into(
    out: Tensor, packed: Tensor, table: Tensor, scales: Tensor, block_size: int
) -> None:
    """Decode a chunk of whole blocks at a time."""
    n = out.numel()
    step = min(DECODE_ELEMENTS, max(2, n + n % 2))
    rows = torch.get_num_threads()
    width = -(-step // 2 // rows)
    index = torch.zeros(rows, width, dtype=torch.int64, device=out.device)
    buffer = torch.empty(rows, width, dtype=torch.int64, device=out.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        count = (stop - start + 1) // 2
        index.view(-1)[:count].copy_(packed[start // 2 : start // 2 + count])
        torch.gather(table.expand(rows, 256), 1, index, out=buffer)
        values = buffer.view(-1).view(torch.float32)[: stop - start]
        chunk_scales = scales[start // block_size : number_of_blocks(stop, block_size)]
        out[start:stop].copy_(scale_blocks_(values, chunk_scales, block_size))
