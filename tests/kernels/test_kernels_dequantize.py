"""Dequantizing is bit-equal to PyTorch's, at every size, alignment, dtype and kind of scale."""

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    fp4,
    make_weight,
    random,
)

from lorax.kernels import reference, tuning
from lorax.kernels.dequantize import dequantize
from lorax.kernels.weight import PackedWeight
from lorax.quant import codebooks
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.four_bit import quantize

TILE = tuning.dequantize(90).tile


def assert_bit_equal(guard, weight, dtype, start=0, count=None):
    count = torch.Size(weight.shape).numel() - start if count is None else count
    expected = reference.dequantize(weight, torch.empty(count, dtype=dtype, device=DEVICE), start)
    out = guard.empty((count,), dtype, DEVICE)
    assert dequantize(weight, out, start) is out
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "nested"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)],
)
def test_bit_equal_for_1_to_40_blocks(guard, dtype, nested):
    for blocks in range(1, 41):
        for n in (64 * blocks - 1, 64 * blocks, 64 * blocks + 1):
            assert_bit_equal(guard, make_weight(guard, (n,), nested=nested, seed=n), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE + 777])
def test_bit_equal_around_the_tile(guard, n, dtype):
    assert_bit_equal(guard, make_weight(guard, (n,)), dtype)


@pytest.mark.parametrize("block_size", [32, 128, 1024, 4096])
def test_bit_equal_for_other_block_sizes_and_fp4(guard, block_size):
    for nested in (True, False):
        weight = make_weight(guard, (3, 5001), fp4(), block_size, nested)
        assert_bit_equal(guard, weight, torch.bfloat16)


def test_against_quantized_tensor(guard):
    """The format's own implementation in lorax.quant, which bitsandbytes' bytes were held to."""
    source = random(67, 129)
    for name in ("nf4", "nf4-dq"):
        q = quantize(source.cpu(), name)
        nested = ()
        if q.nested is not None:
            nested = (q.nested.absmax, dynamic_map(), q.nested.offset)
        tensors = [t.to(DEVICE) for t in nested]
        weight = PackedWeight(
            q.packed.to(DEVICE),
            q.absmax.to(DEVICE),
            codebooks.four_bit("nf4").to(DEVICE),
            tuple(q.shape),
            64,
            *tensors,
        )
        for dtype in DTYPES:
            found = dequantize(weight, guard.empty(q.shape, dtype, DEVICE))
            assert torch.equal(found.cpu(), q.dequantize(dtype))


def test_scales_at_the_edges_of_float32(guard):
    """Denormal scales, the largest ones, zero; products that underflow or round to infinity."""
    weight = make_weight(guard, (64 * 8,), nested=False)
    edges = torch.tensor([1e-45, 1e-40, 1.2e-38, 0.0, 1.0, 65504.0, 3.3e38, 3.4e38])
    weight.absmax.copy_(edges)
    for dtype in DTYPES:
        assert_bit_equal(guard, weight, dtype)


def test_any_chunking_gives_the_same_bits(guard):
    weight = make_weight(guard, (40, 576))
    whole = dequantize(weight, guard.empty((40 * 576,), torch.bfloat16, DEVICE))
    for rows in (1, 3, 8, 39):
        parts = [
            dequantize(
                weight,
                guard.empty((min(rows, 40 - row), 576), torch.bfloat16, DEVICE),
                start=row * 576,
            )
            for row in range(0, 40, rows)
        ]
        assert torch.equal(torch.cat([part.flatten() for part in parts]), whole)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_packed_bytes_at_any_address(guard, offset):
    weight = make_weight(guard, (2 * TILE,))
    shifted = guard.empty((TILE + offset,), torch.uint8, DEVICE)[offset:]
    shifted.copy_(weight.packed)
    assert_bit_equal(guard, weight._replace(packed=shifted), torch.bfloat16)


def test_beyond_2_to_the_31_values(guard):
    """Offsets are int64: a gigabyte of codes, of which only the end is touched."""
    start, count = 2**31 + 64 * 5, 64 * 3
    packed = torch.empty(2**30 + 4096, dtype=torch.uint8, device=DEVICE)
    absmax = torch.empty(2**25 + 128, dtype=torch.float32, device=DEVICE)
    packed[start // 2 : (start + count) // 2] = torch.arange(count // 2, device=DEVICE)
    absmax[start // 64 : (start + count) // 64] = torch.tensor([1.5, 0.3, 7.0])
    code = codebooks.four_bit("nf4").to(DEVICE)
    weight = PackedWeight(packed, absmax, code, (2**31 + 8192,), 64)
    small = PackedWeight(
        packed[start // 2 : (start + count) // 2].clone(),
        absmax[start // 64 : (start + count) // 64].clone(),
        code,
        (count,),
        64,
    )
    found = dequantize(weight, guard.empty((count,), torch.float32, DEVICE), start)
    expected = reference.dequantize(small, torch.empty(count, device=DEVICE))
    assert torch.equal(found, expected)


def test_refusals(guard):
    weight = make_weight(guard, (256,))
    with pytest.raises(ValueError, match="start: 32 is not a multiple"):
        dequantize(weight, guard.empty((64,), torch.float32, DEVICE), start=32)
    with pytest.raises(ValueError, match="expected a contiguous"):
        dequantize(weight, guard.empty((16, 16), torch.float32, DEVICE).t())
