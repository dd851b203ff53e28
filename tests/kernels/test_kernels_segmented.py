"""Rows with different adapters in two launches, against the twin and float64."""

import json
import os
import subprocess
import sys
from pathlib import Path as File

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import DTYPES, guarded, random

from lorax.kernels.segmented import Path, add_paths, add_paths_reference

ROOT = File(__file__).parents[2]


def make_paths(guard, ranks, C, N, dtype=torch.float32):
    return [
        Path(
            guard.copy(random(r, C, seed=10 + i, scale=C**-0.5, dtype=dtype)),
            guard.copy(random(N, r, seed=50 + i, dtype=dtype)),
            (0.5, 2.0, -1.25)[i % 3],
        )
        for i, r in enumerate(ranks)
    ]


def exact(y, x, paths, rows):
    y = y.double().clone()
    for path, own in zip(paths, rows, strict=True):
        for i in own:
            y[i] += path.scaling * (x[i].double() @ path.A.double().t()) @ path.B.double().t()
    return y


def check(guard, r9, name, batch, tokens, ranks, rows, C=70, N=130, dtype=torch.float32):
    shape = (batch, tokens) if tokens else (batch,)
    x = guard.copy(random(*shape, C, dtype=dtype, seed=1))
    y = guard.copy(random(*shape, N, dtype=dtype, seed=2))
    paths = make_paths(guard, ranks, C, N)
    found, twin = guard.copy(y), y.clone()
    add_paths(found, x, paths, rows)
    add_paths_reference(twin, x, paths, rows)
    untouched = [i for i in range(batch) if not any(i in own for own in rows)]
    assert torch.equal(found[untouched], y[untouched])
    used = [i for i in range(batch) if i not in untouched]
    r9.add(name, found[used], twin[used], exact(y, x, paths, rows)[used])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_get_their_own_path(guard, r9, dtype):
    """Ragged sizes, ranks that differ, rows out of order, and rows without a path."""
    for batch, tokens, ranks, rows in (
        (5, 3, (4, 9, 1), ([3, 0], [4], [1])),
        (6, 0, (8, 8), ([5], [2, 0])),
        (3, 40, (17, 65), ([1], [2, 0])),  # more rows than a small tile, more ranks than a tile
        (1, 1, (33,), ([0],)),
    ):
        check(guard, r9, "y", batch, tokens, ranks, rows, dtype=dtype)


def test_a_long_sum_is_split(guard, r9):
    """At 1,056 columns of float32 the first launch has several programs a tile."""
    check(guard, r9, "y", 4, 1, (8, 4), ([2, 0], [1]), C=1056, N=70)
    check(guard, r9, "y", 4, 0, (3, 5), ([0], [1, 2, 3]), C=1056, N=70)


@given(data=st.data())
@settings(max_examples=8)
def test_any_assignment_of_rows(data):
    batch = data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, 5))
    ranks = data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    whose = data.draw(st.lists(st.integers(-1, count - 1), min_size=batch, max_size=batch))
    order = data.draw(st.permutations(range(batch)))
    rows = [[i for i in order if whose[i] == path] for path in range(count)]
    x, y = random(batch, 2, 40, seed=3), random(batch, 2, 24, seed=4)
    with guarded() as guard:
        paths = make_paths(guard, ranks, 40, 24)
        found = guard.copy(y)
        add_paths(found, x, paths, rows)
    torch.testing.assert_close(found.double(), exact(y, x, paths, rows), rtol=0, atol=2e-5)


def test_matrices_of_any_dtype_and_address(guard):
    """A view from the middle of a buffer, whose address is no multiple of 16, and bfloat16."""
    A, B = random(3 * 40 + 1, seed=1)[1:].view(3, 40), random(40, 3, seed=2).t().contiguous().t()
    assert A.data_ptr() % 16
    x, y = random(2, 40, seed=3), random(2, 40, seed=4)
    for path in (Path(A, B, 0.5), Path(A.bfloat16(), B.bfloat16(), 0.5)):
        found = guard.copy(y)
        add_paths(found, x, [path], [[1]])
        expected = exact(y, x, [path], [[1]])
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_nothing_to_add_changes_nothing(guard):
    x, y = random(2, 40), random(2, 24)
    for paths, rows in (([], []), (make_paths(guard, (4,), 40, 24), [[]])):
        found = y.clone()
        add_paths(found, x, paths, rows)
        assert torch.equal(found, y)
    with pytest.raises(ValueError, match="contiguous"):
        add_paths(random(24, 2).t(), x, make_paths(guard, (4,), 40, 24), [[0]])


# Compiled for GPUs that are not here ---------------------------------------------------------

COMPILE = """
import json, sys
sys.path.insert(0, "benchmarks")
import static_cost, torch
from lorax.kernels.launch import compile_only
from lorax.kernels.segmented import Path, add_paths
found = []
for target in (80, 90):
    for dtype in (torch.float32, torch.bfloat16):
        for rank in (16, 200):
            for tokens in (1, 512):
                x, y = (torch.empty(8, tokens, width, dtype=dtype) for width in (4096, 14336))
                path = Path(torch.empty(rank, 4096), torch.empty(14336, rank), 0.5)
                with compile_only(target) as kernels:
                    add_paths(y, x, [path, path], [[0, 2], [1]])
                about = {"target": target, "dtype": str(dtype), "rank": rank, "tokens": tokens}
                about["limit"] = static_cost.SHARED_LIMIT_BYTES[target]
                found += [about | static_cost.examine(kernel) for kernel in kernels]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    """What ptxas says of each launch at a Llama-3-8B's sizes, in a process without interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(
        command, check=True, env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_compiled_for_ampere_and_hopper_without_spills(compiled):
    assert {row["target"] for row in compiled} == {80, 90}
    assert len(compiled) == 2 * 2 * 2 * 2 * 2  # targets, dtypes, ranks, tokens, launches
    assert [row for row in compiled if row["spills"]] == []
    assert [row for row in compiled if row["shared_bytes"] > row["limit"]] == []
    for row in compiled:
        products = row["warp_products"] + row["warp_group_products"]
        assert products > 0 or row["dtype"] == "torch.float32", row
