"""Cross entropy over a frozen head: loss and dX against float64, in chunks, without all logits."""

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    random,
)

from lorax.kernels import cross_entropy as module
from lorax.kernels import reference
from lorax.kernels.cross_entropy import COLUMNS, cross_entropy, softmax_gradient


def make_case(guard, N, V, C=24, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
    hidden = guard.copy(random(N, C, dtype=dtype, seed=1))
    return hidden, guard.copy(random(V, C, dtype=dtype, seed=2, scale=0.5)), guard.copy(targets)


def exact(hidden, weight, targets):
    hidden = hidden.double().requires_grad_()
    logits = hidden @ weight.double().t()
    losses = torch.nn.functional.cross_entropy(
        logits, targets.clamp_min(-1), ignore_index=-1, reduction="sum"
    )
    losses.backward()
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [7, 255, 256, 257, COLUMNS - 1, COLUMNS, COLUMNS + 1])
def test_gradient_around_the_tile(guard, r9, V, dtype):
    case = make_case(guard, 5, V, dtype=dtype)
    _, dx = cross_entropy(*case)
    r9.add("dX", dx, reference.cross_entropy(*case)[1], exact(*case)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses(guard, r9, dtype):
    """Row by row, from the same logits, so that 100 losses make statistics."""
    logits = guard.copy(random(100, 333, dtype=dtype, scale=4.0))
    targets = torch.arange(100, device=DEVICE) * 3
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    results = []
    for function in (softmax_gradient, reference.softmax_gradient):
        losses = guard.empty((100,), torch.float32, DEVICE)
        function(logits.clone(), targets, losses, False)
        results.append(losses)
    r9.add("losses", *results, expected)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_chunks_change_no_bit(guard, rows, monkeypatch):
    hidden, weight, targets = make_case(guard, 17, 300, dtype=torch.float32)
    loss, dx = cross_entropy(hidden, weight, targets)
    sizes = []
    allocate = module.empty
    monkeypatch.setattr(module, "empty", lambda s, *a: sizes.append(s) or allocate(s, *a))
    monkeypatch.setattr(module, "chunk_rows", lambda V, value_bytes: rows)
    chunked_loss, chunked_dx = cross_entropy(hidden, weight, targets)
    assert sizes[-1] == (min(rows, 17), 300), "all logits at once"
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked_dx, dx, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("V", [1, 32000, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("value_bytes", [2, 4])
def test_a_chunk_fills_its_tiles(V, value_bytes):
    """At 261 rows, what 64 MiB hold of Llama-3's logits, three tiles of 128 are 68 % full."""
    rows = module.chunk_rows(V, value_bytes)
    assert rows % 512 == 0
    assert rows == 512 or rows * V * value_bytes <= 2**27
    assert (rows + 512) * V * value_bytes > 2**27, "more rows would fit"


def test_targets_that_count_nothing(guard):
    hidden, weight, targets = make_case(guard, 9, 50, dtype=torch.float32)
    targets[[0, 4, 8]] = -100
    loss, dx = cross_entropy(hidden, weight, targets)
    expected_loss, expected_dx = exact(hidden, weight, targets)
    assert not dx[[0, 4, 8]].any()
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-6)


def test_logits_in_place_only_where_a_gradient_is_wanted(guard):
    logits = guard.copy(random(4, 33))
    before = logits.clone()
    losses = guard.empty((4,), torch.float32, DEVICE)
    softmax_gradient(logits, torch.arange(4, device=DEVICE), losses, False)
    assert torch.equal(logits, before)
    softmax_gradient(logits, torch.arange(4, device=DEVICE), losses, True)
    assert torch.allclose(logits.sum(1), torch.zeros(4, device=DEVICE), atol=1e-6)


def test_rows_with_a_stride(guard):
    wide = guard.copy(random(6, 100))
    view, whole = wide[:, :77], wide[:, :77].contiguous()
    targets = torch.arange(6, device=DEVICE)
    losses = [guard.empty((6,), torch.float32, DEVICE) for _ in range(2)]
    rest = wide[:, 77:].clone()
    softmax_gradient(view, targets, losses[0], True)
    softmax_gradient(whole, targets, losses[1], True)
    assert torch.equal(view, whole)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(wide[:, 77:], rest)


def test_extreme_logits(guard):
    logits = torch.full((3, 5000), float("-inf"), device=DEVICE)
    logits[0, 4999], logits[1, :2], logits[2] = 3.0, 80000.0, -80000.0
    losses = guard.empty((3,), torch.float32, DEVICE)
    targets = torch.tensor([4999, 0, 17], device=DEVICE)
    softmax_gradient(guard.copy(logits), targets, losses, True)
    expected = torch.tensor([0.0, 2.0, 5000.0]).log().clamp_min(0).to(DEVICE)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-2)


def test_a_nan_is_seen(guard):
    hidden, weight, targets = make_case(guard, 3, 40)
    hidden[1, 2] = float("nan")
    loss, dx = cross_entropy(hidden, weight, targets)
    assert loss.isnan()
    assert dx[1].isnan().all()
    assert dx[[0, 2]].isfinite().all()


def test_no_rows(guard):
    hidden, weight, targets = make_case(guard, 0, 40)
    loss, dx = cross_entropy(hidden, weight, targets)
    assert loss == 0
    assert dx.shape == (0, 24)
    assert cross_entropy(*make_case(guard, 2, 40), gradient=False)[1] is None
