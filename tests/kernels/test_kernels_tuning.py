"""The choices by GPU: which row serves which GPU, and what follows from it at real shapes."""

from itertools import pairwise

import kernel_testing  # noqa: F401  first: it makes lorax.kernels importable on a bare machine
import pytest
import torch

from lorax.kernels import decoded, tuning
from lorax.kernels.weight import PackedWeight

TABLES = (tuning._DEQUANTIZE, tuning._VECTOR, tuning._SKINNY, tuning._BACKWARD)
SM_120_ALIKE = (86, 89, 120)  # 99 KB of shared memory a block, mma.sync; no wgmma, no tcgen05


def test_every_family_has_a_row_in_every_table():
    for table in (*TABLES, tuning.MULTIPROCESSORS, tuning.SCRATCH_BYTES, tuning.CROSSOVER):
        assert tuple(sorted(table)) == tuning.FAMILIES


SERVED = {75: 80, 80: 80, 86: 86, 87: 86, 89: 89, 90: 90, 100: 100, 103: 100, 110: 100, 121: 120}


@pytest.mark.parametrize(("capability", "family"), SERVED.items())
def test_a_gpu_takes_its_own_row_or_the_nearest_older_one(capability, family):
    assert tuning.family(capability) == family


def test_consumer_gpus_take_no_data_center_s_row():
    """sm_120 has sm_89's shared memory and tensor cores, not sm_100's; sm_86 no A100's L2."""
    for table in TABLES:
        assert len({repr(table[family]) for family in SM_120_ALIKE}) == 1
    assert tuning.SCRATCH_BYTES[86] <= 6 * 2**20, "the RTX 3090's L2"
    assert tuning.MULTIPROCESSORS[86] < tuning.MULTIPROCESSORS[80]


RANK_TILES = [(1, 64, 16), (16, 32, 16), (17, 32, 32), (33, 64, 64), (64, 32, 32), (512, 64, 64)]


@pytest.mark.parametrize(("rank", "most", "tile"), RANK_TILES)
def test_a_tile_of_ranks(rank, most, tile):
    assert tuning.rank_tile(rank, most) == tile


GATE_UP, DOWN, QUERY, HEAD = (14336, 4096), (4096, 14336), (4096, 4096), (128256, 4096)
SHAPES = [GATE_UP, DOWN, QUERY, HEAD, (1024, 4096), (9728, 2560), (53248, 16384), (100, 300)]


def weight_of(shape, block_size=64):
    """Only the sizes of a weight, which is all that chunks hang on."""
    return PackedWeight(None, None, None, shape, block_size)


def chunks_of(monkeypatch, family, shape, M, block_size=64):
    monkeypatch.setattr(decoded, "capability", lambda device: family)
    x = torch.empty(M, shape[1], dtype=torch.bfloat16, device="meta")
    return decoded._row_chunks(weight_of(shape, block_size), x)


@pytest.mark.parametrize("family", tuning.FAMILIES)
@pytest.mark.parametrize("M", [65, 512, 2048, 8192])
def test_chunks_cost_no_wave_of_tiles(monkeypatch, family, M):
    """All rows once, each chunk from a block on, and no more waves than the whole product has."""
    for shape in SHAPES:
        chunks = chunks_of(monkeypatch, family, shape, M)
        assert chunks[0][0] == 0
        assert chunks[-1][1] == shape[0]
        assert all(one[1] == two[0] for one, two in pairwise(chunks))
        assert all(begin * shape[1] % 64 == 0 for begin, _ in chunks)
        rows = [end - begin for begin, end in chunks]
        waves = sum(tuning.waves(family, M, n) for n in rows)
        assert waves <= tuning.waves(family, M, shape[0]), (shape, rows)


def test_down_proj_is_one_product(monkeypatch):
    """In chunks of 1152 rows it would take 4 waves of an H100's 132 tiles instead of 2: 56 %."""
    assert chunks_of(monkeypatch, 90, DOWN, 2048) == [(0, 4096)]
    assert sum(tuning.waves(90, 2048, rows) for rows in (1152, 1152, 1152, 640)) == 4
    assert tuning.waves(90, 2048, 4096) == 2


def test_chunks_that_cost_nothing_stay_within_the_scratch(monkeypatch):
    chunks = chunks_of(monkeypatch, 90, GATE_UP, 2048)
    assert len(chunks) > 1
    assert max(end - begin for begin, end in chunks) * 4096 * 2 <= tuning.SCRATCH_BYTES[90]


@pytest.mark.parametrize("block_size", [32, 512, 4096])
def test_chunks_of_odd_rows_start_with_a_block(monkeypatch, block_size):
    for begin, _ in chunks_of(monkeypatch, 86, (9000, 321), 65, block_size):
        assert begin * 321 % block_size == 0


def test_no_rows_no_chunks(monkeypatch):
    assert chunks_of(monkeypatch, 90, (0, 64), 65) == []
