"""A LoRA linear over a four-bit base: output and each gradient by name against float64."""

from itertools import product

import pytest
import torch
from kernel_testing import (
    DEVICE,
    DTYPES,
    make_weight,
    random,
)

from lorax.kernels import lora, reference, tuning


def make_case(guard, M, N=70, K=128, r=5, dtype=torch.bfloat16, seed=0):
    weight = make_weight(guard, (N, K), seed=seed)
    leaves = {
        "x": guard.copy(random(M, K, dtype=dtype, seed=seed + 1)),
        "A": guard.copy(random(r, K, seed=seed + 2, scale=0.1)),
        "B": guard.copy(random(N, r, seed=seed + 3, scale=0.1)),
    }
    return weight, leaves, guard.copy(random(N, dtype=dtype, seed=seed + 4))


def run(function, leaves, weight, bias, dy):
    """The output and the gradients by name."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y = function(leaves["x"], weight, bias, leaves["A"], leaves["B"], 0.5)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def truth(x, W, bias, A, B, scaling):
    return x @ W.t() + bias.double() + scaling * (x @ A.t()) @ B.t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 64, 65])
def test_outputs_and_gradients(guard, r9, small_tiles, M, dtype):
    """65 lies beyond the crossover: the base product and the path are cuBLAS there.

    The errors of dB are those of h, M * r numbers: a small M is drawn several times.
    """
    for seed, r in product(range(0, 60, 20 if M < 64 else 60), (1, 5, 17)):
        weight, leaves, bias = make_case(guard, M, r=r, dtype=dtype, seed=seed)
        dy = random(M, 70, dtype=dtype, seed=9)
        W = reference.dequantize(weight, torch.empty(weight.shape, device=DEVICE)).double()
        exact = {name: leaf.double() for name, leaf in leaves.items()}
        expected = run(truth, exact, W, bias, dy)
        twin = run(reference.lora_linear, leaves, weight, bias, dy)
        found = run(lora.lora_linear, leaves, weight, bias, dy)
        for name in ("y", "x", "A", "B"):
            r9.add(name, found[name], twin[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_down_and_cross_over_ragged_shapes(guard, r9, dtype):
    for M, C, r in (
        (1, 64, 8),
        (63, 65, 16),
        (64, 127, 17),
        (65, 129, 1),
        (130, 70, 33),
        (5, 70, 64),
        (66, 20, 65),
    ):
        x = guard.copy(random(M, C, dtype=dtype, seed=1))
        A = guard.copy(random(r, C, seed=2))
        thin = guard.copy(random(M, r, dtype=dtype, seed=3))
        h = x.double() @ A.double().t() * 0.5
        r9.add("down", lora.down(x, A, 0.5), reference.down(x, A, 0.5), h)
        strided = guard.copy(A.t().contiguous()).t()
        r9.add("down, strided", lora.down(x, strided, 0.5), reference.down(x, A, 0.5), h)
        both = x.double().t() @ thin.double() * 0.5
        r9.add("dB", lora.cross(x, thin, 0.5), reference.cross(x, thin, 0.5), both)
        r9.add("dA", lora.cross(thin, x, 0.5), reference.cross(thin, x, 0.5), both.t())


@pytest.mark.parametrize("rank", [33, 65, 128])
@pytest.mark.parametrize("M", [1, 5])
def test_a_path_wider_than_a_tile_of_ranks(guard, r9, small_tiles, M, rank):
    """In every kernel that multiplies with the path, forward and backward."""
    for seed in range(1 if M > 1 else 3):
        weight, leaves, bias = make_case(guard, M, r=rank, seed=20 * seed)
        dy = random(M, 70, dtype=torch.bfloat16, seed=9)
        W = reference.dequantize(weight, torch.empty(weight.shape, device=DEVICE)).double()
        exact = {name: leaf.double() for name, leaf in leaves.items()}
        expected = run(truth, exact, W, bias, dy)
        twin = run(reference.lora_linear, leaves, weight, bias, dy)
        found = run(lora.lora_linear, leaves, weight, bias, dy)
        for name in ("y", "x", "A", "B"):
            r9.add(name, found[name], twin[name], expected[name])


def test_the_base_gets_no_gradient_and_x_is_saved_once(guard):
    weight, leaves, bias = make_case(guard, M=8)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora.lora_linear(leaves["x"], weight, bias, leaves["A"], leaves["B"], 0.5)
    x_bytes = leaves["x"].nbytes
    assert sum(t.data_ptr() == leaves["x"].data_ptr() for t in saved) == 1
    others = [t for t in saved if t.data_ptr() not in {v.data_ptr() for v in leaves.values()}]
    assert sum(t.nbytes for t in others) == 8 * 5 * 2, "besides x, A and B only h is kept"
    assert x_bytes == 8 * 128 * 2
    y.sum().backward()
    assert all(t.grad is None for t in weight if isinstance(t, torch.Tensor))
    assert bias.grad is None


def test_no_dx_where_nobody_wants_it(guard, monkeypatch):
    weight, leaves, bias = make_case(guard, M=8)
    monkeypatch.setattr(lora.matmul, "matmul_dx", None)
    A, B = leaves["A"].requires_grad_(), leaves["B"].requires_grad_()
    lora.lora_linear(leaves["x"], weight, bias, A, B, 0.5).sum().backward()
    assert A.grad is not None
    assert B.grad is not None


def test_leading_dimensions_and_none_at_all(guard):
    weight, leaves, bias = make_case(guard, M=6)
    x, A, B = leaves.values()
    flat = lora.lora_linear(x, weight, bias, A, B, 0.5)
    folded = lora.lora_linear(x.view(2, 3, -1), weight, bias, A, B, 0.5)
    assert torch.equal(folded.view(6, -1), flat)
    gradients = run(lora.lora_linear, {"x": x[:0], "A": A, "B": B}, weight, bias, flat[:0])
    assert gradients["y"].shape == (0, 70)
    assert not gradients["A"].any()
    assert not gradients["B"].any()


def test_a_run_repeats(guard):
    weight, leaves, bias = make_case(guard, M=20, K=64 * 17)
    dy = random(20, 70, dtype=torch.bfloat16)
    first = run(lora.lora_linear, leaves, weight, bias, dy)
    again = run(lora.lora_linear, leaves, weight, bias, dy)
    assert tuning.splits(90, 1, 17) > 1
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
