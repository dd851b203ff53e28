"""Writing a GGUF file through the gguf package, tensor by tensor, and by the save protocol.

Types, shapes and sizes stand in front of all tensors, so they are known before the first value is
made; of the values no more than one tensor's are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorax.errors import EnvironmentProblem, UsageError
from lorax.formats.disk import Disk, write_file_whole


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write.

    name, type: as in the file, "F32", "F16" or "Q8_0". shape: (rows, columns), or (n,).
    values: makes its numbers, or of a quantized type its bytes, when they are written.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // block * size


def check_new(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        UsageError: see above.
    """
    if path.is_symlink() or path.exists():
        raise UsageError(
            f"{path}: is there already; give another path for the file, or remove what is there"
        )


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Sequence[GGUFTensor],
    disk: Disk | None = None,
) -> None:
    """Write a file that appears whole, or not at all.

    Args:
        fields: bool, int (unsigned, 32 bits), float (32 bits), text or a list of these.

    Raises:
        EnvironmentProblem: the disk is full or refuses.
    """
    try:
        write_file_whole(path, lambda to: _write(to, architecture, fields, tensors), disk or Disk())
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: could not be written ({error}); make room there, or give another path"
        ) from None


def _write(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Sequence[GGUFTensor]
) -> None:
    import gguf

    writer: Any = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in fields.items():
            if value == []:  # which the package does not write, and no reader misses
                continue
            _adder(writer, value)(key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            numbers = np.dtype(np.float32)  # of which the package makes no use beside `kind`
            writer.add_tensor_info(tensor.name, tensor.shape, numbers, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (out,) = writer.fout
        writer.write_padding(out, out.tell())
        for tensor in tensors:
            values = tensor.values()
            assert values.nbytes == tensor.nbytes, tensor.name
            out.write(np.ascontiguousarray(values).data)  # the package's numpy.tofile says nothing
            writer.write_padding(out, values.nbytes)  # of a full disk where a tensor is small
    finally:
        writer.close()


def _adder(writer: Any, value: Any) -> Callable[[str, Any], None]:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    return adders[type(value)]
