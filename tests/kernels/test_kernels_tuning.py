"""The choices by GPU: which row serves which GPU, and what follows from it at real shapes."""

import pytest
import torch

from lorax.kernels import tuning

TABLES = (tuning._DEQUANTIZE, tuning._VECTOR, tuning._SKINNY, tuning._BACKWARD)
SM_120_ALIKE = (86, 89, 120)  # 99 KB of shared memory a block, mma.sync; no wgmma, no tcgen05


def test_every_family_has_a_row_in_every_table():
    for table in (*TABLES, tuning.MULTIPROCESSORS, tuning.SCRATCH_BYTES, tuning.CROSSOVER):
        assert tuple(sorted(table)) == tuning.FAMILIES


@pytest.mark.parametrize(
    ("capability", "family"),
    [(75, 80), (80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100), (103, 100)]
    + [(110, 100), (120, 120), (121, 120)],
)
def test_a_gpu_takes_its_own_row_or_the_nearest_older_one(capability, family):
    assert tuning.family(capability) == family


def test_consumer_gpus_take_no_data_center_s_row():
    """sm_120 has sm_89's shared memory and tensor cores, not sm_100's; sm_86 no A100's L2."""
    for table in TABLES:
        assert len({repr(table[family]) for family in SM_120_ALIKE}) == 1
    assert tuning.SCRATCH_BYTES[86] <= 6 * 2**20, "the RTX 3090's L2"
    assert tuning.MULTIPROCESSORS[86] < tuning.MULTIPROCESSORS[80]


@pytest.mark.parametrize(
    ("rank", "most", "tile"),
    [(1, 64, 16), (8, 32, 16), (16, 32, 16), (17, 32, 32), (33, 64, 64), (64, 32, 32)]
    + [(65, 64, 64), (512, 64, 64), (512, 32, 32)],
)
def test_a_tile_of_ranks(rank, most, tile):
    assert tuning.rank_tile(rank, most) == tile
