"""The gguf package's reader, without its cost for long lists.

A GGUF file keeps its vocabulary as one list of strings, each with its length in front:

    length (uint64)  bytes  length (uint64)  bytes ...

The package makes several numpy views of each string while it opens the file: 3.6 s for 50,000
tokens with their merges. Here a list of strings becomes a list of `bytes` in one pass, and a list
of numbers one array. What else is in the file is left to the package.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

import gguf
import numpy as np


class FastReader(gguf.GGUFReader):
    """`gguf.GGUFReader`; a field's `contents()` gives a list of strings as a list of bytes."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start = orig_offs + 12
        if kind[0] == gguf.GGUFValueType.STRING:
            values, end = self._strings(start, int(count[0]))
        elif gguf.GGUFValueType(kind[0]) in self.gguf_scalar_to_np:
            number = self.gguf_scalar_to_np[gguf.GGUFValueType(kind[0])]
            values = self._get(start, number, int(count[0]))
            if len(values) != count[0]:
                raise ValueError(f"a list of {count[0]} numbers is cut off")
            end = start + values.nbytes
        else:  # a list of lists
            return super()._get_field_parts(orig_offs, raw_type)
        # Three parts, of which the third is the data; with this type it comes back as it is.
        return end - orig_offs, [kind, count, values], [2], [gguf.GGUFValueType.ARRAY]

    def _strings(self, start: int, count: int) -> tuple[np.ndarray[Any, Any], int]:
        buffer = self.data.data
        swapped = self.byte_order == "S"
        length_of = struct.Struct("<Q" if (sys.byteorder == "little") != swapped else ">Q")
        found: list[bytes] = []
        for _ in range(count):
            (length,) = length_of.unpack_from(buffer, start)
            end = start + 8 + length
            if end > len(buffer):
                raise ValueError(f"a string of {length} bytes is cut off")
            found.append(bytes(buffer[start + 8 : end]))
            start = end
        values = np.empty(count, dtype=object)
        values[:] = found
        return values, start
