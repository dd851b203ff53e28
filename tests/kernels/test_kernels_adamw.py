"""AdamW over many tensors in one launch: parameters and states against float64."""

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    random,
)

from lorax.kernels import adamw as module
from lorax.kernels import reference
from lorax.kernels.adamw import TILE, adamw, adamw_8bit
from lorax.kernels.hyper import AdamWStep
from lorax.quant.dynamic_map import dynamic_map

SIZES = (0, 1, 15, 16, 17, 255, 256, 257, TILE - 1, TILE, TILE + 1, 2 * TILE + 5)
SIGNED = dynamic_map().to(DEVICE)


def unsigned_map():
    """The unsigned dynamic map (Dettmers et al. 2022): seven decades, 2^(e+1) values each."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1)
        values.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    return torch.cat(values).sort().values.to(DEVICE)


UNSIGNED = unsigned_map()


def exact_step(p, g, m, v, t, lr, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step in float64, from the definition."""
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps), m, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES, (16, 1024, 4096, 48)])
def test_adamw_over_five_steps(guard, r9, sizes, dtype):
    """The second list has 16-byte sizes and addresses only: the vectorized path."""
    start = [random(n, dtype=dtype, seed=n, scale=0.01) for n in sizes]
    mine, its, truth = (
        [[guard.copy(p), *(guard.copy(torch.zeros_like(p, dtype=torch.float32)) for _ in "mv")]
         for p in start]
        for _ in range(3)
    )  # fmt: skip
    truth = [[t.double() for t in tensors] for tensors in truth]
    for t in range(1, 6):
        grads = [random(n, dtype=dtype, seed=100 * t + n) for n in sizes]
        rates = [1e-3 * (1 + index) for index in range(len(sizes))]
        steps = [AdamWStep.at(t, rate, weight_decay=0.1) for rate in rates]
        for function, state in ((adamw, mine), (reference.adamw, its)):
            p, m, v = zip(*state, strict=True)
            function(list(p), [guard.copy(g) for g in grads], list(m), list(v), steps)
        for index, g in enumerate(grads):
            p, m, v = truth[index]
            truth[index] = exact_step(p, g.double(), m, v, t, rates[index], 0.1)
    for found, twin, expected in zip(mine, its, truth, strict=True):
        for name, *tensors in zip("pmv", found, twin, expected, strict=True):
            r9.add(name, *tensors)


def quantized_state(guard, n):
    blocks = -(-n // 256)
    return (
        guard.copy(torch.full((n,), 127, dtype=torch.uint8, device=DEVICE)),
        guard.copy(torch.zeros(blocks, device=DEVICE)),
        guard.copy(torch.zeros(n, dtype=torch.uint8, device=DEVICE)),
        guard.copy(torch.zeros(blocks, device=DEVICE)),
    )


def decoded(state):
    m, m_scale, v, v_scale = state
    block = torch.arange(m.numel(), device=DEVICE) // 256
    return SIGNED[m.int()] * m_scale[block], UNSIGNED[v.int()] * v_scale[block]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES, (16, 1024, 4096, 48)])
def test_adamw_8bit(guard, r9, sizes, dtype):
    start = [random(n, dtype=dtype, seed=n, scale=0.01) for n in sizes]
    runs = [([guard.copy(p) for p in start], [quantized_state(guard, n) for n in sizes])
            for _ in range(2)]  # fmt: skip
    truth = [[p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()]
             for p in start]  # fmt: skip
    for t in range(1, 4):
        grads = [random(n, dtype=dtype, seed=100 * t + n) for n in sizes]
        steps = [AdamWStep.at(t, 1e-3, weight_decay=0.1)] * len(sizes)
        for function, (params, states) in zip(
            (adamw_8bit, reference.adamw_8bit), runs, strict=True
        ):
            columns = [list(column) for column in zip(*states, strict=True)]
            function(params, [guard.copy(g) for g in grads], *columns, steps, SIGNED, UNSIGNED)
        for index, g in enumerate(grads):
            truth[index] = exact_step(
                *[truth[index][0], g.double(), *truth[index][1:]], t, 1e-3, 0.1
            )
    for index, expected in enumerate(truth):
        (p, states), (twin_p, twin_states) = ((run[0][index], run[1][index]) for run in runs)
        for name, *tensors in zip(
            "pmv", (p, *decoded(states)), (twin_p, *decoded(twin_states)), expected, strict=True
        ):
            r9.add(name, *tensors)


def test_a_second_moment_that_is_not_zero_is_never_stored_as_zero(guard):
    """Gradients 1e5 apart in one block: no step exceeds ten learning rates."""
    g = guard.copy(torch.where(torch.arange(256, device=DEVICE) % 7 == 0, 1.0, 1e-5))
    g[3] = 0.0
    p = guard.copy(torch.zeros(256, device=DEVICE))
    state = quantized_state(guard, 256)
    columns = [[tensor] for tensor in state]
    for t in range(1, 11):
        before = p.clone()
        adamw_8bit([p], [g], *columns, [AdamWStep.at(t, 1e-3)], SIGNED, UNSIGNED)
        assert (p - before).abs().max() <= 10 * 1e-3
    zero = g == 0
    assert (state[2][~zero] > 0).all()
    assert (state[2][zero] == 0).all()


def test_all_tensors_in_one_launch(guard, monkeypatch):
    """450 adapter tensors, each with its own learning rate."""
    starts = []
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *a, **o: starts.append(grid))
    tensors = [torch.zeros(16, 8 + index % 3, device=DEVICE) for index in range(450)]
    codes = [torch.zeros_like(t, dtype=torch.uint8) for t in tensors]
    scales = [torch.zeros(1, device=DEVICE) for _ in tensors]
    steps = [AdamWStep.at(1, 1e-4 * index) for index in range(450)]
    adamw(tensors, tensors, tensors, tensors, steps)
    adamw_8bit(tensors, tensors, codes, scales, codes, scales, steps, SIGNED, UNSIGNED)
    assert starts == [(450,), (450,)]


def test_none_at_all():
    adamw([], [], [], [], [])
    adamw_8bit([], [], [], [], [], [], [], SIGNED, UNSIGNED)


def test_refusals():
    p = torch.zeros(4, 6, device=DEVICE)
    step = [AdamWStep.at(1, 1e-3)]
    with pytest.raises(ValueError, match="expected contiguous"):
        adamw([p.t()], [p.t()], [p], [p], step)
    with pytest.raises(ValueError, match="one dtype for all"):
        adamw([p], [p.half()], [p], [p], step)
    with pytest.raises(ValueError, match="0 tensors beside 1"):
        adamw([p], [p], [], [p], step)
