"""The hand-written backward passes against finite differences in float64, and their cost."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorax
from lorax.models.llama import RMSNorm
from lorax.models.rope import rotate
from lorax.quant.linear import QuantizedLinear
from lorax.training.fast import attention, head, products
from lorax.training.fast.mlp import swiglu_mlp
from lorax.training.fast.norm import rms_norm
from lorax.training.fast.parts import Part
from lorax.training.fast.projections import project

torch.manual_seed(0)


def base(n_in, n_out, kind="dense", bias=False):
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64).requires_grad_(False)
    if kind == "dense":
        return linear
    return QuantizedLinear(lorax.quantize(linear.weight.float(), kind), linear.bias)


def part(n_in, n_out, r=2, kind="dense", bias=False, dropout=0.0):
    frozen = base(n_in, n_out, kind, bias)
    if not r:
        return Part(frozen)
    A = torch.randn(r, n_in, dtype=torch.float64, requires_grad=True)
    B = torch.randn(n_out, r, dtype=torch.float64, requires_grad=True)
    return Part(frozen, A, B, 0.7, dropout)


def factors(parts):
    return [factor for each in parts for factor in (each.A, each.B) if factor is not None]


def holds(function, x, parts):
    """Every derivative, of x, A and B, as finite differences have it; the same draws each time."""

    def seeded(x, *_):
        torch.manual_seed(1)
        return function(x, parts)

    return torch.autograd.gradcheck(seeded, (x, *factors(parts)))


KINDS = {
    "dense": {},
    "bias": {"bias": True},
    "dropout": {"dropout": 0.4},
    "nf4": {"kind": "nf4"},
    "nf4 with double quantization, bias and dropout": {
        "kind": "nf4-dq",
        "bias": True,
        "dropout": 0.3,
    },
    "no adapter": {"r": 0},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_one_linear_gradcheck(kind):
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert holds(project, x, [part(16, 5, **kind)])


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_three_linears_of_one_input_gradcheck(kind):
    x = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    parts = [part(8, 6, **kind), part(8, 3, r=0), part(8, 4, r=1, dropout=0.5)]
    assert holds(project, x, parts)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_the_mlp_gradcheck(kind):
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parts = [part(6, 8, **kind), part(6, 8, **kind), part(8, 6, **kind)]
    assert holds(lambda x, parts: swiglu_mlp(x, *parts), x, parts)


def test_an_input_that_needs_no_gradient_gets_none():
    """The first layer's input is a frozen embedding."""
    parts = [part(8, 6), part(8, 5)]
    x = torch.randn(4, 8, dtype=torch.float64)
    sum(y.sum() for y in project(x, parts)).backward()
    assert x.grad is None
    assert all(factor.grad is not None for factor in factors(parts))


@pytest.mark.parametrize(("rows", "classes"), [(1, 7), (5, 3), (40, 97)])
def test_the_head_against_cross_entropy(rows, classes, monkeypatch):
    """Blocks of a few rows and classes: loss and dx of torch's cross entropy in float64."""
    monkeypatch.setattr(head, "ROWS", 8)
    monkeypatch.setattr(head, "BLOCK", 10)
    linear = nn.Linear(16, classes, bias=False).requires_grad_(False)
    x = torch.randn(rows, 16, requires_grad=True)
    targets = torch.randint(0, classes, (rows,))
    loss = head.fast_head_loss(x, linear, targets)
    (2 * loss).backward()
    exact = x.detach().double().requires_grad_()
    expected = F.cross_entropy(F.linear(exact, linear.weight.double()), targets, reduction="sum")
    (2 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_head_is_converted_in_blocks(monkeypatch):
    """Through float32, in blocks that do not divide the vocabulary: nearer than plain bfloat16."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(head, "BLOCK", 10)
    linear = nn.Linear(16, 37, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 37, (6,))
    loss = head.fast_head_loss(x, linear, targets)
    loss.backward()
    exact = x.detach().double().requires_grad_()
    expected = F.cross_entropy(F.linear(exact, linear.weight.double()), targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (64, 48, 96)])
def test_onednn_multiplies_against_float64(shape):
    rows, n_in, n_out = shape
    assert products.onednn_works()
    x, W, dy = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(rows, n_out)
    for found, expected in (
        (products.onednn(x, W), x.double() @ W.double().t()),
        (products.onednn(dy, W.t()), dy.double() @ W.double()),
    ):
        assert (found - expected).norm() / expected.norm() < products.PROBE_BOUND


def test_onednn_is_left_alone_where_it_is_missing_or_wrong(monkeypatch):
    for broken in (missing, lambda x, W: F.linear(x, W) * 1.001):
        products.onednn_works.cache_clear()
        monkeypatch.setattr(products, "onednn", broken)
        assert not products.onednn_works()
    products.onednn_works.cache_clear()


def missing(x, W):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def test_nothing_stays_alive_behind_a_step():
    """No reference cycle: without the collector, what a step made is gone when it is over."""
    parts = [part(32, 48), part(32, 48), part(48, 32, dropout=0.1)]
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)

    def step():
        y = swiglu_mlp(x, *parts)
        (first, second) = project(y, parts[:2])
        (first.square().sum() + second.sum()).backward()
        for tensor in (x, *factors(parts)):
            tensor.grad = None

    step()
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        for _ in range(5):
            step()
        assert tensors_alive() == before
    finally:
        gc.enable()


def tensors_alive():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


ATTENTIONS = {
    "grouped heads, two rows": {"heads": 4, "keys": 2, "lengths": [5], "batch": 2},
    "one key head": {"heads": 3, "keys": 1, "lengths": [5]},
    "as many key heads": {"heads": 2, "keys": 2, "lengths": [6]},
    "packed documents": {"heads": 2, "keys": 1, "lengths": [3, 1, 5]},
    "one token": {"heads": 2, "keys": 1, "lengths": [1]},
}


@pytest.fixture(params=[(256, 256), (3, 2), (2, 4)], ids=str)
def tiling(request, monkeypatch):
    """Tiles that keep P and tiles that compute it again."""
    monkeypatch.setattr(attention, "TILE", request.param[0])
    monkeypatch.setattr(attention, "KEPT", request.param[1])


def attention_inputs(heads, keys, lengths, dtype=torch.float64, batch=1):
    T, D = sum(lengths), 2
    sizes = [(batch, T, n, D) for n in (heads, keys, keys)]
    found = [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]
    angles = torch.cat([torch.arange(n) for n in lengths]).double().outer(torch.tensor([0.9]))
    angles = torch.cat([angles, angles], dim=1)
    return found, (angles.cos().to(dtype), angles.sin().to(dtype)), lengths


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("how", ATTENTIONS.values(), ids=list(ATTENTIONS))
def test_attention_gradcheck(how):
    heads, rope, lengths = attention_inputs(**how)
    assert torch.autograd.gradcheck(
        lambda *heads: attention.causal_attention(*heads, rope, lengths), heads
    )


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("how", ATTENTIONS.values(), ids=list(ATTENTIONS))
def test_attention_against_torchs(how):
    """Each document by itself through rotate and scaled_dot_product_attention."""
    (query, key, value), rope, lengths = attention_inputs(**how)
    turned = [rotate(x.transpose(1, 2), *rope) for x in (query, key)]
    split = zip(*(x.split(lengths, 2) for x in (*turned, value.transpose(1, 2))), strict=True)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True, scale=0.3)
            for each in split
        ],
        dim=2,
    )
    found = attention.causal_attention(query, key, value, rope, lengths, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 7), (2, 4, 3, 6)])
def test_rms_norm_gradcheck(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_forward_is_bit_equal_to_the_plain_one(dtype):
    plain = RMSNorm(24, 1e-5).to(dtype).requires_grad_(False)
    plain.weight.normal_()
    x = torch.randn(3, 5, 24).to(dtype)
    assert torch.equal(rms_norm(x, plain.weight, 1e-5), plain(x))
