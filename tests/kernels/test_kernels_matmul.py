"""Products with a four-bit weight: the fused kernels' error against float64, within R9's bound."""

from itertools import product

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    FEW_BLOCKS,
    MORE_BLOCKS,
    ROWS,
    STEP,
    fp4,
    make_weight,
    random,
)

from lorax.kernels import decoded, launch, matmul, reference, tuning

WIDTH = tuning.backward(90).columns


def dense(weight):
    return reference.dequantize(weight, torch.empty(weight.shape, device=DEVICE)).double()


def check_product(r9, weight, x, bias=None, path=None, multiply=matmul.fused):
    truth = x.double() @ dense(weight).t()
    if bias is not None:
        truth += bias.double()
    if path is not None:
        truth += path[2] * path[0].double() @ path[1].double().t()
    twin = reference.matmul(x, weight, bias, path)
    r9.add("y", multiply(x, weight, bias, path), twin, truth)


def check_dx(r9, weight, dy, path=None, multiply=matmul.fused_dx):
    truth = dy.double() @ dense(weight)
    if path is not None:
        truth += path[2] * path[0].double() @ path[1].double().t()
    twin = reference.matmul_dx(dy, weight, path)
    r9.add("dx", multiply(dy, weight, path), twin, truth)


def make_path(guard, M, width, dtype, r=5):
    h = guard.copy(random(M, r, dtype=dtype, seed=3))
    return h, guard.copy(random(width, r, seed=4)), 0.5


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize(
    "counts", [FEW_BLOCKS, pytest.param(MORE_BLOCKS, marks=pytest.mark.nightly)], ids=len
)
def test_product_for_1_to_40_blocks(guard, r9, small_tiles, M, counts):
    for blocks in counts:
        weight = make_weight(guard, (5, 64 * blocks), seed=blocks)
        x = guard.copy(random(M, 64 * blocks, dtype=torch.bfloat16, seed=blocks))
        check_product(r9, weight, x)


# Around a program's 8 rows; less than a step of K, and around two of them.
VECTOR_ROWS, VECTOR_COLUMNS = (1, 7, 8, 9, 33), (64, 2 * STEP - 64, 2 * STEP, 2 * STEP + 64)
ALL_SIZES = list(product(VECTOR_ROWS, VECTOR_COLUMNS))
# Each number of rows and each of columns, ragged ones together; the other pairs by night.
EACH_SIZE = [(1, 64), (7, 2 * STEP - 64), (8, 2 * STEP), (9, 2 * STEP + 64), (33, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(EACH_SIZE, id="each"),
        pytest.param(ALL_SIZES, id="all", marks=pytest.mark.nightly),
    ],
)
def test_vector_kernel(guard, r9, small_tiles, dtype, sizes):
    for N, K in sizes:
        weight = make_weight(guard, (N, K))
        x = guard.copy(random(1, K, dtype=dtype, seed=1))
        bias = guard.copy(random(N, dtype=dtype, seed=2))
        check_product(r9, weight, x)
        check_product(r9, weight, x, bias, make_path(guard, 1, N, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [2, 15, 16, 17, 33, 64, 65])
def test_skinny_kernel(guard, r9, small_tiles, M, dtype):
    for N, K in ((ROWS - 1, 192), (ROWS, 64), (ROWS + 1, 320)):
        weight = make_weight(guard, (N, K))
        x = guard.copy(random(M, K, dtype=dtype, seed=1))
        bias = guard.copy(random(N, dtype=dtype, seed=2))
        check_product(r9, weight, x)
        check_product(r9, weight, x, bias, make_path(guard, M, N, dtype))


def test_the_shipped_tiles(guard, r9):
    rows = tuning.skinny(90).rows
    for N, M in ((rows - 1, 2), (rows, 17), (rows + 1, 33)):
        weight = make_weight(guard, (N, 192))
        check_product(r9, weight, guard.copy(random(M, 192, dtype=torch.bfloat16)))
    vector = tuning.vector(90)
    for K in (vector.step - 64, vector.step, vector.step + 64):
        weight = make_weight(guard, (vector.rows + 1, K))
        for dtype in DTYPES:
            check_product(r9, weight, guard.copy(random(1, K, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 16, 17, 65])
def test_backward_kernel(guard, r9, small_tiles, M, dtype):
    for N, K in ((1, WIDTH - 64), (63, WIDTH), (65, WIDTH + 64), (130, 3 * WIDTH)):
        weight = make_weight(guard, (N, K))
        dy = guard.copy(random(M, N, dtype=dtype, seed=1))
        check_dx(r9, weight, dy)
        check_dx(r9, weight, dy, make_path(guard, M, K, dtype))


@pytest.mark.parametrize("block_size", [32, 128, 512, 4096])
def test_other_blocks_fp4_and_plain_scales(guard, r9, small_tiles, block_size):
    for nested in (True, False):
        rows = 33 if block_size < 4096 else 9  # a block of 4096 is as long as all else together
        weight = make_weight(guard, (rows, max(block_size, 96)), fp4(), block_size, nested)
        for M in (1, 5):
            x = random(M, weight.shape[1], dtype=torch.bfloat16, seed=M)
            check_product(r9, weight, guard.copy(x))
        check_dx(r9, weight, guard.copy(random(5, rows, dtype=torch.bfloat16)))


def chunks_of_64(rows):
    return [(begin, min(begin + 64, rows)) for begin in range(0, rows, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_crossover(guard, r9, dtype, monkeypatch):
    """Decoded in chunks of rows; also rows that hold no whole number of blocks."""
    monkeypatch.setattr(decoded, "_row_chunks", lambda weight, x: chunks_of_64(weight.shape[0]))
    sizes, scratch = [], decoded._scratch
    monkeypatch.setattr(decoded, "_scratch", lambda n, like: sizes.append(n) or scratch(n, like))
    for N, K in ((200, 320), (150, 321), (70, 96)):
        weight = make_weight(guard, (N, K))
        x = guard.copy(random(7, K, dtype=dtype, seed=1))
        bias = guard.copy(random(N, dtype=dtype, seed=2))
        path = make_path(guard, 7, N, dtype)
        check_product(r9, weight, x, bias, path, matmul.unfused)
        check_dx(r9, weight, guard.copy(random(7, N, dtype=dtype)), multiply=matmul.unfused_dx)
    assert len(sizes) == 6
    assert max(sizes) <= 200 * 321


def test_the_crossover_decides(guard, monkeypatch):
    calls = []
    for name in ("fused", "unfused", "fused_dx", "unfused_dx"):
        monkeypatch.setattr(matmul, name, lambda *a, name=name: calls.append(name))
    weight, ragged = make_weight(guard, (9, 64)), make_weight(guard, (9, 63))
    limit = tuning.crossover(launch.capability(torch.device(DEVICE)), torch.bfloat16)
    for M in (1, limit, limit + 1):
        matmul.matmul(random(M, 64, dtype=torch.bfloat16), weight)
        matmul.matmul_dx(random(M, 9, dtype=torch.bfloat16), weight)
    matmul.matmul(random(2, 64), weight)
    matmul.matmul(random(1, 63), ragged)
    assert calls == ["fused", "fused_dx"] * 2 + ["unfused", "unfused_dx"] + ["unfused"] * 2


@pytest.mark.parametrize("M", [1, 4])
def test_strided_inputs(guard, small_tiles, M):
    weight = make_weight(guard, (20, 128))
    wide = random(M, 300, dtype=torch.bfloat16)
    for x in (wide[:, 1:129], wide[:, 3:259:2], random(128, M, dtype=torch.bfloat16).t()):
        assert torch.equal(matmul.fused(x, weight), matmul.fused(x.contiguous(), weight))
    dy = random(20, M, dtype=torch.bfloat16).t()
    assert torch.equal(matmul.fused_dx(dy, weight), matmul.fused_dx(dy.contiguous(), weight))


def test_leading_dimensions_and_none_at_all(guard):
    weight = make_weight(guard, (20, 128))
    x = random(2, 3, 128, dtype=torch.bfloat16)
    assert torch.equal(matmul.fused(x, weight).view(6, 20), matmul.fused(x.view(6, 128), weight))
    assert matmul.matmul(x[:0], weight).shape == (0, 3, 20)
    assert matmul.matmul_dx(random(0, 20, dtype=torch.bfloat16), weight).shape == (0, 128)


def test_the_same_call_gives_the_same_bits(guard):
    """Split sums are added in a fixed order, and the arrival counters are zero again."""
    weight = make_weight(guard, (33, 64 * 30))
    x = random(5, 64 * 30, dtype=torch.bfloat16)
    dy = random(5, 33, dtype=torch.bfloat16)
    assert tuning.splits(90, 2, 30) == 16
    for call in (lambda: matmul.fused(x, weight), lambda: matmul.fused_dx(dy, weight)):
        first = call()
        assert all(torch.equal(call(), first) for _ in range(2))
    counted = [c for c in launch._counters.values() if not c.is_meta]  # layer_cost.py leaves such
    assert counted
    assert not any(counters.any() for counters in counted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_is_seen_and_stays_in_its_row(guard, dtype):
    weight = make_weight(guard, (20, 128))
    x = random(3, 128, dtype=dtype)
    x[1, 77] = float("nan")
    y = matmul.fused(x, weight)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
