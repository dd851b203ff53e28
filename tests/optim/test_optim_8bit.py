"""AdamW8bit: against float64 AdamW and bitsandbytes, and what nearest codes would break."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lorax.errors import UsageError
from lorax.optim import AdamW, AdamW8bit, PagedAdamW8bit, flat
from lorax.optim import adamw8bit as module
from lorax.optim.adamw8bit import quantize_positive_
from lorax.quant.blockwise import dequantize_blockwise
from lorax.quant.codebooks import four_bit
from lorax.quant.dynamic_map import dynamic_map
from lorax.quant.nearest import midpoints, nearest_table

LR = 1.0


def displacement(kind, steps, n=16384, dtype=torch.float32, **kwargs):
    """Where parameters that begin at zero are after steps along the same normal gradients."""
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    optimizer = kind([p], lr=1e-3, weight_decay=0.01, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(n, generator=generator).to(dtype)
        optimizer.step()
    return p.detach().double()


def relative_rms(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_first_step_against_float64_adamw():
    """The parameters see the moments before they are rounded: only float32 stands between."""
    exact = displacement(torch.optim.AdamW, 1, dtype=torch.float64, foreach=False)
    assert relative_rms(displacement(AdamW8bit, 1), exact) < 1e-5


def test_50_steps_against_bitsandbytes_and_float64_adamw():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    exact = displacement(torch.optim.AdamW, 50, dtype=torch.float64, foreach=False)
    theirs = displacement(bitsandbytes.optim.AdamW8bit, 50)
    ours = displacement(AdamW8bit, 50)
    assert relative_rms(ours, theirs) < 1e-2
    assert relative_rms(ours, exact) <= 1.25 * relative_rms(theirs, exact)


def largest_steps(gradients, betas=(0.9, 0.999)):
    """Per step (ours, AdamW's in float64): |step| in learning rates, each (n,)."""
    n = gradients[0].numel()
    p, q = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n, dtype=torch.float64))
    ours = AdamW8bit([p], lr=LR, betas=betas, eps=1e-12, weight_decay=0, min_8bit_size=0)
    exact = torch.optim.AdamW([q], lr=LR, betas=betas, eps=1e-12, weight_decay=0, foreach=False)
    for gradient in gradients:
        p.data.zero_()
        q.data.zero_()
        p.grad, q.grad = gradient, gradient.double()
        ours.step()
        exact.step()
        yield p.detach().abs(), q.detach().abs()


def worst_while_adamw_stays_within_one(gradients, betas=(0.9, 0.999)):
    """Our largest step over the elements whose AdamW steps have all been within one rate."""
    worst, tame = 0.0, None
    for ours, exact in largest_steps(gradients, betas):
        within = exact <= 1 + 1e-9
        tame = within if tame is None else tame & within
        if tame.any():
            worst = max(worst, ours[tame].max().item())
    return worst


@st.composite
def mixed_gradients(draw):
    """Gradients over up to 12 decades: constant, noisy, alternating, fading or resting; bursts."""
    n = draw(st.sampled_from([64, 256, 700]))
    steps = draw(st.sampled_from([3, 30, 150]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    decades = draw(st.floats(0, 12))
    scale = 10 ** (-decades * torch.rand(n, generator=generator))
    kind = draw(st.sampled_from(["constant", "normal", "alternating", "fading", "resting"]))
    rare = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.1]))
    burst_at = draw(st.integers(0, steps - 1))
    burst = 10 ** draw(st.floats(0, 6))
    gradients = []
    for t in range(steps):
        g = scale.clone()
        if kind == "normal":
            g *= torch.randn(n, generator=generator)
        elif kind == "alternating":
            g *= (-1) ** t
        elif kind == "fading":
            g *= 0.97**t
        elif kind == "resting":
            g *= torch.rand(n, generator=generator) < 0.5
        if t == burst_at:
            g[rare] *= burst
        gradients.append(g)
    return gradients


def two_scales(ratio, n=256, steps=10):
    """A block of gradients `ratio` times smaller than its first, which rest every other step."""
    work, rest = torch.full((n,), 1 / ratio), torch.zeros(n)
    work[0] = rest[0] = 1.0
    return [work, rest] * (steps // 2)


def burst_at_the_start(times, n=256, steps=400):
    """One large gradient raises the block's scale; afterwards everything is even."""
    scale = torch.logspace(-2, 0, n)
    first = scale.clone()
    first[0] = times
    return [first, *[scale] * (steps - 1)]


@settings(max_examples=60, deadline=None)
@given(gradients=mixed_gradients(), betas=st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.5, 0.99)]))
@example(gradients=two_scales(2500.0), betas=(0.9, 0.999))
@example(gradients=two_scales(1e5), betas=(0.9, 0.999))
@example(gradients=burst_at_the_start(30.0), betas=(0.9, 0.999))
def test_no_step_exceeds_10_rates_where_adamw_stays_within_one(gradients, betas):
    assert worst_while_adamw_stays_within_one(gradients, betas) <= 10


def test_nearest_codes_explode_where_ours_do_not(monkeypatch):
    """The test above can fail: v = 0 and m != 0 is a step of more than 1e4 learning rates."""

    def nearest_only(x, round_up, table, codes, absmax):
        torch.amax(x, dim=1, out=absmax)
        codes.copy_(table.codes(x / absmax[:, None]))

    assert worst_while_adamw_stays_within_one(two_scales(3000.0)) < 2
    monkeypatch.setattr(module, "quantize_positive_", nearest_only)
    assert worst_while_adamw_stays_within_one(two_scales(3000.0)) > 1e4


def test_a_second_moment_gets_stuck_without_rounding_up(monkeypatch):
    """And without the second rule, the floor alone lets steps grow past 10."""
    assert worst_while_adamw_stays_within_one(burst_at_the_start(30.0)) < 6
    monkeypatch.setattr(module, "OUTGROWN", float("inf"))
    assert worst_while_adamw_stays_within_one(burst_at_the_start(30.0)) > 10


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.floats(-44, 30), min_size=1, max_size=64),
    zeros=st.integers(0, 5),
    round_up=st.booleans(),
)
def test_what_is_not_zero_is_never_stored_as_zero(exponents, zeros, round_up):
    x = torch.tensor([10.0**e for e in exponents] + [0.0] * zeros, dtype=torch.float32)[None]
    codes, absmax = torch.empty(x.shape, dtype=torch.uint8), torch.empty(1)
    up = torch.full(x.shape, round_up)
    _, unsigned = module.tables(x.device)
    quantize_positive_(x, up, unsigned, codes, absmax)
    back = torch.empty(x.numel())
    dequantize_blockwise(codes[0], absmax, unsigned.values, x.numel(), back)
    assert torch.equal(back == 0, x[0] == 0)
    if round_up:  # never below, but for the two roundings of y = x / absmax and back
        assert (back >= x[0] * (1 - 3e-7)).all()


def test_a_stored_second_moment_is_never_zero_in_the_optimizer():
    p = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([p])
    p.grad = torch.logspace(-18, 0, 4096)
    for _ in range(3):
        optimizer.step()
    exp_avg, exp_avg_sq = optimizer.moments(p)
    assert (exp_avg_sq > 0).all()
    assert (exp_avg[-16:] > 0).all()
    assert (optimizer.state[p]["exp_avg_sq"] > 0).all()


def test_maps_against_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed)
        assert torch.equal(dynamic_map(signed=signed), theirs)
    assert dynamic_map()[module.SIGNED_ZERO] == 0
    assert dynamic_map(signed=False)[0] == 0


@pytest.mark.parametrize("code", [four_bit("nf4"), dynamic_map(), dynamic_map(signed=False)])
def test_nearest_table_against_the_search(code):
    """Every cell's ends, every boundary and its neighbours, NaN, zeros, and random values."""
    boundaries = midpoints(code)
    cells = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    ends = torch.cat([cells, cells | 0xFFFF]).view(torch.float32)
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    special = torch.tensor([0.0, -0.0, 1, -1, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45])
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.cat(
        [
            ends[ends.isfinite()],
            boundaries,
            boundaries.nextafter(up),
            boundaries.nextafter(down),
            code,
            special,
            values,
            values * values.abs() ** 5,
        ]
    )
    search = torch.bucketize(y, boundaries).to(torch.uint8)
    assert torch.equal(nearest_table(code, y.device).codes(y), search)


def test_state_bytes_are_2_03_a_parameter():
    """SmolLM2's LoRA at r = 16, tensors below 4096 elements in 8 bits too, and as they come."""
    shapes = [(16, 576), (576, 16), (16, 576), (192, 16), (16, 1536), (576, 16)] * 30
    ours = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in ours:
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in ours)
    optimizer = AdamW8bit(ours, min_8bit_size=0)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert 2.03 < optimizer.state_bytes() / count < 2.04
    assert 2.03 < held / count < 2.04
    usual = AdamW8bit(ours)
    usual.step()
    small = sum(p.numel() for p in ours if p.numel() < 4096)
    assert small > 0
    expected = (8 * small + 2.03125 * (count - small)) / count
    assert usual.state_bytes() / count == pytest.approx(expected, abs=0.005)


def test_threshold_and_block_size_are_the_users():
    p, q = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(999))
    p.grad, q.grad = torch.ones(1000), torch.ones(999)
    optimizer = AdamW8bit([p, q], min_8bit_size=1000, block_size=64)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[p]["exp_avg_absmax"].shape == (16,)
    assert optimizer.state[q]["exp_avg"].dtype == torch.float32
    assert set(optimizer.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
    for wrong in (0, 100, 8192):
        with pytest.raises(UsageError, match="block_size"):
            AdamW8bit([p], block_size=wrong)
    with pytest.raises(UsageError, match="min_8bit_size"):
        AdamW8bit([p], min_8bit_size=-1)


def test_small_tensors_step_as_adamw_does():
    ours = [nn.Parameter(torch.randn(30, 30)) for _ in range(3)]
    theirs = copy.deepcopy(ours)
    optimizer, oracle = AdamW8bit(ours), AdamW(theirs)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(30, 30)
            q.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2000), min_size=2, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_neighbours_in_a_page_do_not_touch_each_other(sizes, seed):
    """Blocks never run across tensors: each steps as it would alone, ragged ends and all."""
    generator = torch.Generator().manual_seed(seed)
    together = [nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    alone = copy.deepcopy(together)
    one = PagedAdamW8bit(together, min_8bit_size=0)
    each = [AdamW8bit([p], min_8bit_size=0) for p in alone]
    for step in range(6):
        for index, (p, q) in enumerate(zip(together, alone, strict=True)):
            if (step + index) % 3 == 2:
                p.grad = q.grad = None
                continue
            scale = 10.0 ** (-index)
            p.grad = torch.randn(p.shape, generator=generator) * scale
            q.grad = p.grad.clone()
        one.step()
        for optimizer in each:
            optimizer.step()
    for p, q, optimizer in zip(together, alone, each, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[q].items():
            assert torch.equal(one.state[p][name], value)


def test_tiles_of_a_large_tensor_step_as_one(monkeypatch):
    results = []
    for most in (2**18, 1024):
        monkeypatch.setitem(flat.PAGE_ELEMENTS, "cpu", most)
        p = nn.Parameter(torch.zeros(5003))
        optimizer = AdamW8bit([p])
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            p.grad = torch.randn(5003, generator=generator)
            optimizer.step()
        results.append((p.detach().clone(), *optimizer.moments(p)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_moments_are_what_the_codes_say():
    p = nn.Parameter(torch.zeros(8192))
    p.grad = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW8bit([p], betas=(0.0, 0.0))
    optimizer.step()
    exp_avg, exp_avg_sq = (m.numpy() for m in optimizer.moments(p))
    g = p.grad.numpy()
    state = optimizer.state[p]
    scale = np.repeat(state["exp_avg_absmax"].numpy(), 256)
    assert np.array_equal(dynamic_map().numpy()[state["exp_avg"].numpy()] * scale, exp_avg)
    assert np.abs(exp_avg - g).max() <= 0.0072 * np.abs(g).max()  # half the widest gap of the map
    assert np.abs(exp_avg_sq - g * g).max() <= 0.0036 * (g * g).max()
