"""Clipping inside AdamW's step, against torch.nn.utils.clip_grad_norm_ before it."""

import math

import pytest
import torch
from kernel_testing import DEVICE, random

from lorax.backend import backend
from lorax.optim import AdamW, AdamW8bit
from lorax.optim.clip import clip_later, clips_later

SHAPES = ((16, 33), (5,), (64, 16), (3000,))


def parameters(dtype=torch.float32):
    made = [torch.nn.Parameter(random(*s, dtype=dtype, seed=i)) for i, s in enumerate(SHAPES)]
    return made


def set_gradients(own, step, scale=1.0):
    for i, p in enumerate(own):
        p.grad = random(*p.shape, dtype=p.dtype, seed=100 * step + i, scale=scale)


def state_of(own, optimizer):
    moments = [part for p in own for part in optimizer.moments(p)]
    return [*(p.detach().clone() for p in own), *moments]


def make(kind, own):
    return kind(own, lr=1e-2, **({"min_8bit_size": 0} if kind is AdamW8bit else {}))


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
@pytest.mark.parametrize("name", ["triton", "pytorch"])
@pytest.mark.parametrize(("most", "scale"), [(1.0, 1.0), (0.01, 3.0), (0.0, 1.0), (1e6, 1.0)])
def test_three_clipped_steps_against_clip_grad_norm(kind, name, most, scale):
    """Bit for bit in the kernel and in PyTorch: the factor, and gradients rounded behind it."""
    mine, theirs = parameters(), parameters()
    optimizers = make(kind, mine), make(kind, theirs)
    with backend(name):
        for step in range(3):
            set_gradients(mine, step, scale)
            set_gradients(theirs, step, scale)
            norm = clip_later(optimizers[0], mine, most)
            expected = torch.nn.utils.clip_grad_norm_(theirs, most or math.inf)
            assert torch.equal(norm, expected)
            for optimizer in optimizers:
                optimizer.step()
    pairs = zip(state_of(mine, optimizers[0]), state_of(theirs, optimizers[1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
@pytest.mark.parametrize("name", ["triton", "pytorch"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_whose_norm_is_no_number_changes_nothing(kind, name, value):
    own = parameters()
    optimizer = make(kind, own)
    with backend(name):
        set_gradients(own, 0)
        optimizer.step()
        before = state_of(own, optimizer)
        set_gradients(own, 1)
        own[2].grad[3, 4] = value
        assert not clip_later(optimizer, own, 1.0).isfinite()
        optimizer.step()
    pairs = zip(before, state_of(own, optimizer), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_factor_is_for_one_step():
    own = parameters()
    optimizer = AdamW(own, lr=1e-2)
    set_gradients(own, 0)
    clip_later(optimizer, own, 1e-3)
    optimizer.step()
    assert optimizer.factor is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_rounded_behind_the_factor(dtype):
    mine, theirs = parameters(dtype), parameters(dtype)
    optimizers = AdamW(mine, lr=1e-2), AdamW(theirs, lr=1e-2)
    with backend("triton"):
        set_gradients(mine, 0)
        set_gradients(theirs, 0)
        clip_later(optimizers[0], mine, 0.5)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_gradients_on_a_cpu_and_other_optimizers_are_clipped_before_the_step():
    own = [torch.nn.Parameter(torch.ones(3))]
    own[0].grad = torch.ones(3)
    assert not clips_later(AdamW(own), own)
    assert not clips_later(torch.optim.AdamW(own), own)
    assert clips_later(AdamW(own), []) is False
    assert (
        DEVICE == "cpu" or clips_later(AdamW(own), [torch.nn.Parameter(own[0].to(DEVICE))]) is False
    )
