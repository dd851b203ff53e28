"""What the kernel tests share: where kernels run, guarded buffers, weights, and the bound of R9.

Without a GPU the kernels run in Triton's interpreter, which is chosen when a kernel is defined: so
this module comes before any import of lorax.kernels.
"""

import importlib.util
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
if importlib.util.find_spec("lorax") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("lorax.kernels") is None:  # a bare GPU machine: lorax is not installed
    spec = importlib.util.spec_from_file_location(
        "lorax.kernels",
        ROOT / "kernels/__init__.py",
        submodule_search_locations=[str(ROOT / "kernels")],
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lorax.kernels"] = module
    spec.loader.exec_module(module)

from lorax.kernels import launch, reference, tuning  # noqa: E402
from lorax.kernels.weight import PackedWeight  # noqa: E402
from lorax.quant import codebooks  # noqa: E402
from lorax.quant.dynamic_map import dynamic_map  # noqa: E402

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    assert isinstance(tl.sum, interpreter.InterpretedFunction), (
        "triton was imported before TRITON_INTERPRET=1 was set; tests/conftest.py does that"
    )
    _convert_float = interpreter._convert_float

    def _convert(data, source, target, rounding):
        """Triton 3.9's interpreter gets two conversions wrong that the hardware gets right.

        float32 to bfloat16 it cuts off (the hardware's cvt.rn rounds to nearest); denormal bfloat16
        become other numbers in float32.
        """
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.uint16).numpy().reshape(data.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return _convert_float(data, source, target, rounding)

    def _as_float32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _create_dot_of_values(builder, a, b, *rest):
        """Triton 3.9's interpreter multiplies the bits of bfloat16 operands, as integers."""
        return _create_dot(builder, _as_float32(a), _as_float32(b), *rest)

    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _create_dot_of_values

# In the interpreter, which pays for a tile's whole size; a GPU keeps its own tiles.
ROWS = 32  # of W a program
STEP = 256  # of K, for the vector kernel

# Numbers of blocks in a row: all that a step of the vector kernel can be left with (4 blocks
# each), around 16 and 32, and many; the others behave as one of these, and come in `make nightly`.
FEW_BLOCKS = (*range(1, 10), 15, 16, 17, 31, 32, 33, 40)
MORE_BLOCKS = tuple(sorted(set(range(1, 41)) - set(FEW_BLOCKS)))

GUARD_BYTES = 256
POISON = 0xFF  # a NaN in every floating dtype, the last code in a byte
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# bitsandbytes' FP4: a sign bit and seven magnitudes, ordered by their bits; two zeros.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def fp4() -> torch.Tensor:
    positive = torch.tensor(FP4_MAGNITUDES) / 12.0
    return torch.cat([positive, -positive]).to(DEVICE)


def nf4() -> torch.Tensor:
    return codebooks.four_bit("nf4").to(DEVICE)


class Guarded:
    """Allocates tensors in the middle of poisoned buffers, and looks at the edges afterwards."""

    def __init__(self):
        self.buffers = []

    def empty(self, shape, dtype, device):
        count = torch.Size(shape).numel()
        size = count * torch.empty((), dtype=dtype).element_size()
        buffer = torch.full((size + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8, device=device)
        self.buffers.append((buffer, size))
        return buffer[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(shape)

    def copy(self, tensor):
        """The same tensor with poison around it."""
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self):
        for buffer, size in self.buffers:
            assert (buffer[:GUARD_BYTES] == POISON).all(), "written before a buffer's start"
            assert (buffer[GUARD_BYTES + size :] == POISON).all(), "written past a buffer's end"


@contextmanager
def guarded():
    """Inside, the kernels' own buffers are guarded too; the edges are checked on the way out."""
    guard = Guarded()
    before = launch._allocate
    launch._allocate = guard.empty
    try:
        yield guard
    finally:
        launch._allocate = before
    guard.check()


def shrink_tiles(monkeypatch):
    """Smaller tiles and at most two splits, where the interpreter runs the kernels."""
    if DEVICE == "cpu":
        skinny, vector = tuning.skinny(90), tuning.vector(90)
        monkeypatch.setitem(tuning._SKINNY, 90, replace(skinny, rows=ROWS))
        monkeypatch.setitem(tuning._VECTOR, 90, replace(vector, step=STEP))
        monkeypatch.setattr(tuning, "splits", lambda gpu, tiles, steps: min(2, max(1, steps)))


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def make_weight(guard, shape, code=None, block_size=64, nested=True, seed=0) -> PackedWeight:
    """A random weight in four bits, every tensor of it in a guarded buffer."""
    code = nf4() if code is None else code
    packed, absmax = reference.quantize_4bit(random(*shape, seed=seed), code, block_size)
    tables = {}
    if nested:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        dynamic = dynamic_map().to(DEVICE)
        absmax, second = reference.quantize_8bit(absmax - offset, dynamic, 256)
        tables = {
            "nested_absmax": guard.copy(second),
            "nested_map": guard.copy(dynamic),
            "nested_offset": guard.copy(offset),
        }
    return PackedWeight(
        guard.copy(packed), guard.copy(absmax), guard.copy(code), tuple(shape), block_size, **tables
    )


class WithinR9:
    """R9: a kernel's error against float64 is at most 1.5 times its twin's.

    Results of one scale are gathered under a name and judged together: a handful of values are no
    statistics, and a twin may be exact by luck. So `check` wants at least 64.
    """

    def __init__(self):
        self.results = {}

    def add(self, name, found, twin, truth):
        assert found.shape == twin.shape == truth.shape, name
        assert found.dtype == twin.dtype, name
        errors = [(y.double() - truth.double()).flatten() for y in (found, twin)]
        self.results.setdefault(name, []).append(torch.stack(errors))

    def check(self):
        for name, errors in self.results.items():
            together = torch.cat(errors, 1)
            assert together.shape[1] >= 64, f"{name}: {together.shape[1]} values say nothing"
            mine, its = together.square().mean(1).sqrt().tolist()
            assert mine <= 1.5 * its, f"{name}: {mine:.3g}; the twin's {its:.3g}"
