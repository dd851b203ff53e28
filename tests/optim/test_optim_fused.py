"""The Triton kernels behind the optimizers: both ways give the same moments, codes and scales.

Without a GPU the kernels run in Triton's interpreter, which rounds each operation as the GPU does.
What parts the parameters is torch's square root on a CPU, and nothing else: see `right_root`.
"""

import copy

import kernel_testing  # first: it mends the interpreter
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorax.backend import backend
from lorax.kernels import adamw as kernels
from lorax.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, flat
from lorax.optim.adamw8bit import SIGNED_ZERO
from lorax.optim.fused import Launches, takes_kernel

SHAPES = [(16, 37), (5,), (), (3, 200), (1,), (0,), (2, 256)]  # the interpreter is slow
STEPS = 12
ROUNDS = 6  # run_both's gradients have four scales, and some are missing in each fourth step
# On a CPU pages are plain memory, and the paged optimizers the others: `make nightly` takes both.
WIDE = [AdamW, pytest.param(PagedAdamW, marks=pytest.mark.nightly)]
NARROW = [AdamW8bit, pytest.param(PagedAdamW8bit, marks=pytest.mark.nightly)]
DEVICE = kernel_testing.DEVICE
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="compares with PyTorch on a CPU")


@pytest.fixture
def right_root(monkeypatch):
    """torch's square root with one rounding, as IEEE 754 wants it and as a GPU has it."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


def pair(kind, dtype=torch.float32, shapes=SHAPES, groups=None, **kwargs):
    """Two equal optimizers over equal parameters: ((optimizer, parameters), (the same))."""
    generator = torch.Generator().manual_seed(0)
    first = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    first.append(nn.Parameter(torch.randn(33, 20, generator=generator).to(dtype).t()))
    sides = []
    for ps in (first, copy.deepcopy(first)):
        grouped = [{"params": ps[i :: len(groups)], **g} for i, g in enumerate(groups or [])]
        sides.append((kind(grouped or ps, **kwargs), ps))
    return sides


def run_both(sides, steps, scale=1.0, seed=0):
    """Step the first in PyTorch and the second in Triton, along gradients of many scales."""
    (plain, ps), (fused, qs) = sides
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for index, (p, q) in enumerate(zip(ps, qs, strict=True)):
            if step % 4 == 1 and index % 3 == 2:
                p.grad = q.grad = None
                continue
            g = torch.randn(p.shape, generator=generator) * scale * 10.0 ** -((index + step) % 4)
            p.grad, q.grad = g.to(p.dtype), g.to(q.dtype)
        plain.step()
        with backend("triton"):
            fused.step()


def assert_moments_equal(sides):
    (plain, ps), (fused, qs) = sides
    for p, q in zip(ps, qs, strict=True):
        assert set(plain.state[p]) == set(fused.state[q])
        for name, value in plain.state[p].items():
            assert torch.equal(value, fused.state[q][name]), name


def assert_equal(sides):
    assert_moments_equal(sides)
    for p, q in zip(sides[0][1], sides[1][1], strict=True):
        assert torch.equal(p, q)


group_values = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-6, 1e-1),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
        "eps": st.floats(1e-12, 1e-2),
        "weight_decay": st.just(0.0) | st.floats(1e-5, 0.5),
        "maximize": st.booleans(),
    }
)


@pytest.mark.parametrize("kind", WIDE)
@settings(max_examples=4)
@given(
    groups=st.lists(group_values, min_size=1, max_size=3),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_32_bits_against_pytorch(kind, groups, scale, seed):
    """Moments bit for bit; a parameter within 2^-23 of the way its steps have gone, and its own."""
    sides = pair(kind, groups=groups)
    before = [p.detach().clone() for p in sides[0][1]]
    run_both(sides, STEPS, scale, seed)
    assert_moments_equal(sides)
    for p, q, start in zip(sides[0][1], sides[1][1], before, strict=True):
        lr = max(group["lr"] for group in groups)
        size = torch.maximum(torch.maximum(p.abs(), start.abs()), torch.tensor(STEPS * lr))
        assert ((p - q).abs() <= STEPS * 2**-23 * size).all()


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("dtype", kernel_testing.DTYPES)
def test_32_bits_are_equal_but_for_the_square_root(kind, dtype, right_root):
    sides = pair(kind, dtype, lr=1e-2, betas=(0.8, 0.99))
    run_both(sides, 2 * ROUNDS)
    assert_equal(sides)


def test_torch_s_square_root_is_what_parts_them():
    """Why the parameters' bits are not promised: this fails once torch's root is rounded right."""
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    off = x.sqrt() != torch.from_numpy(np.sqrt(x.numpy()))
    sides = pair(AdamW, lr=1e-2)
    run_both(sides, 30)
    equal = all(torch.equal(p, q) for p, q in zip(sides[0][1], sides[1][1], strict=True))
    assert equal != bool(off.any())


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("dtype", kernel_testing.DTYPES)
@pytest.mark.parametrize("block_size", [16, 256, 2048])
def test_8_bits_are_equal_but_for_the_square_root(kind, dtype, block_size, right_root):
    sides = pair(kind, dtype, lr=1e-2, betas=(0.8, 0.99), min_8bit_size=6, block_size=block_size)
    run_both(sides, ROUNDS)
    assert_equal(sides)


@pytest.mark.parametrize("kind", NARROW)
def test_8_bit_codes_and_scales_against_pytorch(kind):
    """They depend on gradients alone, not on the parameters, so no root parts them."""
    sides = pair(kind, min_8bit_size=0)
    run_both(sides, 12, scale=1e3)
    assert_moments_equal(sides)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-12, 1.0, 1e15])
def test_the_rules_of_the_second_moment_hold_in_the_kernel(scale):
    """Never code 0 but for v = 0; scales of 1e-30 at least; what is outgrown is rounded up."""
    sides = pair(AdamW8bit, shapes=[(1000,)], min_8bit_size=0)
    optimizer, (p, _) = sides[1]
    gradient = torch.logspace(-18, 0, 1000) * scale
    gradient[::7] = 0
    for step in range(12):
        for side, ps in sides:
            ps[0].grad = gradient * (50.0 if step == 3 else 1.0)
            with backend("triton" if side is optimizer else "pytorch"):
                side.step()
    state = optimizer.state[p]
    assert (state["exp_avg_sq_absmax"] >= 1e-30).all()
    squares = gradient.square() * 1e-3  # float32 makes the smallest of them zero
    assert (state["exp_avg_sq"][squares > 0] > 0).all()
    assert (state["exp_avg_sq"][gradient == 0] == 0).all()
    assert_moments_equal(sides)


def test_what_lies_behind_a_tensor_in_a_page_stays_zero():
    sides = pair(AdamW8bit, min_8bit_size=0)
    run_both(sides, 3)
    optimizer = sides[1][0]
    moments = optimizer._pages[0].moments
    used = torch.zeros(moments.exp_avg.numel(), dtype=torch.bool)
    page = optimizer._pages[0]
    for start, p in zip(page.starts, page.parameters, strict=False):
        used[start : start + p.numel()] = True
    assert not used.all()
    assert (moments.exp_avg[~used] == SIGNED_ZERO).all()
    assert (moments.exp_avg_sq[~used] == 0).all()


@pytest.fixture
def launches(monkeypatch):
    """The grids of the kernels that are started, by name."""
    found = []
    start = kernels.launch

    def record(kernel, grid, *args, **options):
        found.append((kernel.fn.__name__, grid[0]))
        start(kernel, grid, *args, **options)

    monkeypatch.setattr(kernels, "launch", record)
    return found


def stepped(kind, count=40, **kwargs):
    ps = [nn.Parameter(torch.zeros(16, 8 + i % 3)) for i in range(count)]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = kind([{"params": ps[::2]}, {"params": ps[1::2], "lr": 1e-2}], **kwargs)
    with backend("triton"):
        optimizer.step()
    return optimizer


def test_one_launch_for_all_tensors_and_groups(launches, monkeypatch):
    """However many pages they fill; each tensor has its own rate in the table."""
    monkeypatch.setitem(flat.PAGE_ELEMENTS, "cpu", 1000)
    optimizer = stepped(AdamW)
    assert len(optimizer._pages) > 2
    assert launches == [("_adamw_kernel", 40)]
    for group in optimizer.param_groups:
        for p in group["params"]:
            torch.testing.assert_close(p.detach(), torch.full_like(p, -group["lr"]))


def test_a_launch_for_each_kind_of_moments(launches):
    stepped(AdamW8bit, min_8bit_size=150)
    assert sorted(launches) == [("_adamw_8bit_kernel", 13), ("_adamw_kernel", 27)]


def test_a_launch_a_page_where_pages_come_and_go(launches, monkeypatch):
    monkeypatch.setitem(flat.PAGE_ELEMENTS, "cpu", 1000)
    optimizer = stepped(PagedAdamW)
    assert len(launches) == len(optimizer._pages) > 2


def test_fused_false_keeps_to_pytorch_on_any_device(launches):
    stepped(AdamW, fused=False)
    assert launches == []
    stepped(AdamW, fused=True)
    assert len(launches) == 1


def test_a_cpu_takes_pytorch(launches):
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    AdamW([p]).step()
    assert launches == []


def test_float64_stays_in_pytorch(launches):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    for kind in (AdamW, AdamW8bit):
        optimizer = kind([p])
        with backend("triton"):
            optimizer.step()
            assert not takes_kernel(optimizer._pages[0], optimizer.param_groups[0])
    assert launches == []


def test_nothing_to_step_starts_nothing(launches):
    Launches().start()
    optimizer = AdamW([nn.Parameter(torch.zeros(4))])
    with backend("triton"):
        optimizer.step()
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    with backend("triton"):
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    assert launches == [("_adamw_kernel", 1)]
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 1


@pytest.mark.parametrize("kind", WIDE + NARROW)
def test_a_run_may_change_sides(kind, right_root):
    """PyTorch, Triton and PyTorch again, with the state saved and loaded: the same run."""
    sides = pair(kind, lr=1e-2)
    (plain, ps), (other, qs) = sides
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        if step in (4, 8):
            saved = copy.deepcopy(other.state_dict())
            other = kind(qs, lr=99.0)
            other.load_state_dict(saved)
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        plain.step()
        with backend("triton" if 4 <= step < 8 else "pytorch"):
            other.step()
    assert_equal([(plain, ps), (other, qs)])
