"""Quantizing on the GPU gives the bytes and scales that the format defines, bit for bit."""

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    FEW_BLOCKS,
    MORE_BLOCKS,
    fp4,
    nf4,
    random,
)

from lorax.kernels import reference
from lorax.kernels.quantize import TILE, quantize_4bit, quantize_8bit
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.four_bit import quantize

DYNAMIC = dynamic_map().to(DEVICE)


def rotated(dtypes, turn):
    return dtypes[turn % 3 :] + dtypes[: turn % 3]


def assert_bit_equal(found, expected):
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == its.dtype
        assert mine.shape == its.shape
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


@pytest.mark.parametrize(
    "counts", [FEW_BLOCKS, pytest.param(MORE_BLOCKS, marks=pytest.mark.nightly)], ids=len
)
def test_four_bits_for_1_to_40_blocks(guard, counts):
    for blocks in counts:
        sizes = (64 * blocks - 1, 64 * blocks, 64 * blocks + 1)
        for n, dtype in zip(sizes, rotated(DTYPES, blocks), strict=True):
            x = guard.copy(random(n, dtype=dtype, seed=n))
            assert_bit_equal(quantize_4bit(x, nf4(), 64), reference.quantize_4bit(x, nf4(), 64))


@pytest.mark.parametrize("n", [0, 1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 333])
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_around_the_tile_and_other_blocks(guard, n, block_size):
    x = guard.copy(random(n))
    for code in (nf4(), fp4()):
        found = quantize_4bit(x, code, block_size)
        assert_bit_equal(found, reference.quantize_4bit(x, code, block_size))
    found = quantize_8bit(x, DYNAMIC, block_size)
    assert_bit_equal(found, reference.quantize_8bit(x, DYNAMIC, block_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_against_lorax_quant(guard, dtype):
    """R1: all finite float16 and bfloat16 values, next to a 1 that sets the scale, and alone."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[torch.isfinite(patterns)]
    small = values[values.abs() <= 1]
    small = small[: small.numel() // 31 * 31].view(-1, 31)
    beside_one = torch.cat([small, torch.ones_like(small[:, :1])], 1)
    for source in (values, beside_one):
        q = quantize(source, "nf4", 32)
        found = quantize_4bit(guard.copy(source.to(DEVICE)), nf4(), 32)
        assert_bit_equal([t.cpu() for t in found], (q.packed, q.absmax))


def test_ties_go_down_and_midpoints_are_float32(guard):
    boundaries, _ = reference.search_tables(nf4())
    around = torch.cat([boundaries, boundaries.nextafter(torch.tensor(2.0, device=DEVICE))])
    x = torch.cat([around, torch.ones(34, device=DEVICE)])
    packed, absmax = quantize_4bit(guard.copy(x), nf4(), 64)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:30].tolist()
    assert absmax.item() == 1
    assert codes == [*range(15), *range(1, 16)]


def test_fp4_gives_its_second_zero_just_above_zero_as_bitsandbytes_does(guard):
    """One set of bytes, whatever quantizes.

    That the library's own on a CPU are bitsandbytes' is held by test_fp4_s_two_zeros and its
    neighbours in tests/quant: what is just below zero gets code 0, what is just above it code 8.
    """
    x = guard.copy(torch.linspace(-1, 1, 4096).to(DEVICE))
    packed, absmax = quantize_4bit(x, fp4(), 4096)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    assert set(codes.tolist()) == set(range(16))
    least = 0.0625 / 12
    assert (x[codes == 8] > 0).all()
    assert (codes[(x < 0) & (x > -least / 2)] == 0).all()
    assert ((x < 0) & (x > -least / 2)).any()
    library = quantize(x.cpu(), "fp4", 4096)
    assert torch.equal(packed.cpu(), library.packed)
    assert torch.equal(absmax.cpu(), library.absmax)


def test_every_entry_of_the_dynamic_map_comes_back(guard):
    codes, absmax = quantize_8bit(guard.copy(DYNAMIC), DYNAMIC, 256)
    assert codes.tolist() == list(range(256))
    assert absmax.item() == 1


def test_a_bad_value_spoils_its_own_block(guard):
    x = random(64 * 4)
    x[70], x[140] = float("nan"), float("inf")
    found = quantize_4bit(guard.copy(x), nf4(), 64)
    assert_bit_equal(found, reference.quantize_4bit(x, nf4(), 64))
    clean = reference.quantize_4bit(random(64 * 4), nf4(), 64)
    for block in (0, 3):
        assert torch.equal(found[0].view(4, 32)[block], clean[0].view(4, 32)[block])
        assert found[1][block] == clean[1][block]
    assert found[1][1].isnan()
    assert found[1][2].isinf()


def test_zeros_and_denormals(guard):
    x = torch.cat([torch.zeros(64), torch.full((64,), 1e-40), random(64).cpu() * 1e-38]).to(DEVICE)
    found = quantize_4bit(guard.copy(x), nf4(), 64)
    assert_bit_equal(found, reference.quantize_4bit(x, nf4(), 64))
    assert found[0][:32].tolist() == [119] * 32


def test_strided_equals_contiguous(guard):
    x = random(90, 70)
    for strided in (x.t(), x[::2], x[:, 3:40]):
        found = quantize_4bit(strided, nf4(), 64)
        assert_bit_equal(found, quantize_4bit(strided.contiguous(), nf4(), 64))
