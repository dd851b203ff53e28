"""The training step's kernels: against float64 beside their twins, over ragged shapes."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import DEVICE, DTYPES, make_weight, random

from lorax.kernels import reference, reference_step, step
from lorax.kernels.drop import Drop
from lorax.kernels.weight import PackedWeight, go_together, path_width


def gradients(function, leaves, dy):
    """autograd's, of a function of the leaves in float64, by name."""
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    y = function(**leaves)
    y.backward(dy.double())
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def rms_norm(t, weight):
    return t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-5) * weight


def both_sides(call):
    return call(step), call(reference_step)


def spread(guard, rows, dtype, extra=5):
    """`rows` (M, C) with unused columns behind each row, which nothing may touch."""
    M, C = rows.shape
    wide = guard.empty((M, C + extra), dtype, DEVICE)
    wide[:, :C] = rows
    return wide[:, :C]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), [(1, 64), (3, 100), (5, 257)])
def test_norm_and_its_gradient(guard, r9, dtype, M, C):
    x, delta = (guard.copy(random(M, C, dtype=dtype, seed=s)) for s in (1, 2))
    weight = guard.copy(1 + 0.1 * random(C, dtype=dtype, seed=3))
    dy, beside = (guard.copy(random(M, C, dtype=dtype, seed=s)) for s in (4, 5))
    mine, twin = both_sides(lambda side: side.norm(x, weight, 1e-5, delta))
    assert torch.equal(mine[0], x + delta), "the sum is rounded as the plain layer rounds it"
    y, exact = gradients(rms_norm, {"t": mine[0], "weight": weight}, dy)
    r9.add("y", mine[1], twin[1], y)
    back, twins = both_sides(lambda side: side.norm_backward(dy, mine[0], weight, mine[2], beside))
    r9.add("t", back, twins, exact["t"] + beside.double())
    alone, twins = both_sides(lambda side: side.norm_backward(dy, mine[0], weight, mine[2]))
    r9.add("t, nothing beside", alone, twins, exact["t"])


def test_norm_without_an_addition_gives_its_input_and_writes_between_other_columns(guard):
    x, weight = guard.copy(random(3, 100)), guard.copy(random(100, seed=2))
    out = spread(guard, random(3, 100), torch.float32)
    total, y, _ = step.norm(x, weight, 1e-5, out=out)
    assert total is x
    assert y is out
    assert torch.equal(y, step.norm(x, weight, 1e-5)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "others", "D", "T"), [(3, 1, 8, 4), (17, 2, 64, 3), (2, 0, 6, 5)]
)
def test_rope_and_its_gradient(guard, r9, dtype, heads, others, D, T):
    angles = random(T, D // 2, seed=7).repeat(1, 2)
    cos, sin = (guard.copy(f(angles).to(dtype)) for f in (torch.cos, torch.sin))
    rows = random(2 * T, (heads + others) * D, dtype=dtype, seed=1)

    def turned(x):
        x = x.view(2, T, heads, D)
        c, s = cos.double()[:, None], sin.double()[:, None]
        first, second = x.chunk(2, -1)
        return (x * c + torch.cat([-second, first], -1) * s).reshape(2 * T, -1)

    turning = rows[:, : heads * D]
    dy = random(2 * T, heads * D, dtype=dtype, seed=2)
    y, exact = gradients(turned, {"x": turning}, dy)
    found, twin = both_sides(lambda side: side.rope_(spread(guard, rows, dtype), cos, sin, heads))
    r9.add("y", found[:, : heads * D], twin[:, : heads * D], y)
    assert torch.equal(found[:, heads * D :], rows[:, heads * D :]), "values do not turn"
    found, twin = both_sides(lambda side: side.rope_(dy.clone(), cos, sin, heads, back=True))
    r9.add("x", found, twin, exact["x"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "width"), [(1, 64), (3, 65), (2, 1030)])
def test_swiglu_and_its_gradient(guard, r9, dtype, M, width):
    g, u, da = (random(M, width, dtype=dtype, seed=s, scale=2) for s in (1, 2, 3))
    both = spread(guard, torch.cat([g, u], 1), dtype)
    y, exact = gradients(lambda g, u: F.silu(g) * u, {"g": g, "u": u}, da)
    out = spread(guard, random(M, width), dtype)
    r9.add("a", step.swiglu(both, out), reference_step.swiglu(both), y)
    found, twin = both_sides(lambda side: side.swiglu_backward(da, both))
    r9.add("g", found[0][:, :width], twin[0][:, :width], exact["g"])
    r9.add("u", found[0][:, width:], twin[0][:, width:], exact["u"])
    assert torch.equal(found[1], out), "the backward's a has the forward's bits"
    in_place = spread(guard, both, dtype)
    assert step.swiglu_backward(da, in_place, in_place)[0] is in_place
    assert torch.equal(in_place, found[0])


def drop(probability=0.3, seed=11, site=3):
    return Drop(torch.tensor([seed], device=DEVICE), site, probability)


def mask_of(how, M, C):
    """The mask as a kernel applies it: what stays of ones."""
    ones = torch.zeros(M, C, device=DEVICE)
    path = step.add_dropped(ones, torch.ones(M, 1, device=DEVICE), torch.ones(1, C).to(DEVICE), how)
    return path != 0


@pytest.mark.parametrize(("M", "C"), [(1, 64), (70, 130), (65, 3)])
def test_the_mask_is_the_twins_to_the_bit(M, C):
    for how in (drop(), drop(0.9, seed=-5, site=2**31 - 1), drop(0.01, seed=2**62 + 7, site=0)):
        assert torch.equal(mask_of(how, M, C), reference_step.kept(how, M, C))


def test_philox_is_the_published_one():
    """Salmon et al.'s known answer for a counter and key of zeros, and of all ones."""
    zero = torch.tensor([0])
    words = [int(w) for w in reference_step.philox(zero, zero, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_masks_of_other_seeds_and_sites_are_independent_and_drop_their_share():
    M, C, p = 64, 256, 0.25
    masks = [mask_of(drop(p, *key), M, C).float() for key in ((1, 0), (1, 1), (2, 0))]
    spread_of_mean = (p * (1 - p) / (M * C)) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 4 * spread_of_mean
    for one, other in ((0, 1), (0, 2), (1, 2)):
        agree = (masks[one] * masks[other]).mean().item()
        assert abs(agree - (1 - p) ** 2) < 6 * spread_of_mean


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C", "r"), [(66, 130, 5), (3, 67, 33)])
def test_products_with_dropout_against_the_dropped_input(guard, r9, dtype, M, C, r):
    """h, dA and dx of one Linear see one mask, whatever their tiles."""
    how = drop()
    mask = reference_step.kept(how, M, C).double() * how.scale
    x = spread(guard, random(M, C, dtype=dtype, seed=1), dtype)
    A = guard.copy(random(r, C, seed=2))
    dh = spread(guard, random(M, r, dtype=dtype, seed=3), dtype)
    out = spread(guard, random(M, r), dtype)
    found, twin = both_sides(lambda side: side.down(x, A, 0.5, out, how).clone())
    r9.add("h", found, twin, 0.5 * (x.double() * mask) @ A.double().t())
    found, twin = both_sides(lambda side: side.cross(dh, x, 1.0, how))
    r9.add("dA", found, twin, dh.double().t() @ (x.double() * mask))
    before = random(M, C, dtype=dtype, seed=4)
    found, twin = both_sides(
        lambda side: side.add_dropped(spread(guard, before, dtype), dh, A, how)
    )
    exact = before.double() + mask * (dh.double() @ A.to(dtype).double())
    r9.add("dx", found, twin, exact)


def group(guard, K=128, rows=(70, 3, 192), nested=True):
    weights = [make_weight(guard, (N, K), nested=nested, seed=N) for N in rows]
    first = weights[0]
    weights = [w._replace(code=first.code, nested_map=first.nested_map) for w in weights]
    assert go_together(weights)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("ranks", [(5, 0, 17), (1, 1, 1), (0, 0, 0), (65, 3, 8)])
def test_weights_decoded_together_with_their_paths(guard, dtype, nested, ranks):
    """Bit for bit: the decoding is dequantize's, a factor is multiplied and rounded once."""
    K, weights = 128, group(guard, nested=nested)
    R, N = path_width(ranks), sum(w.shape[0] for w in weights)
    ups = [
        (random(w.shape[0], r, seed=r), 1.7) if r else None
        for w, r in zip(weights, ranks, strict=True)
    ]
    downs = [(random(r, K, seed=r), 1.0) if r else None for r in ranks]
    for name, factors, shape in (
        ("decode_columns", ups, (N, K + R)),
        ("decode_rows", downs, (N + R, K)),
    ):
        found = getattr(step, name)(weights, factors, guard.empty(shape, dtype, DEVICE))
        twin = getattr(reference_step, name)(
            weights, factors, torch.empty(shape, dtype=dtype, device=DEVICE)
        )
        assert torch.equal(found, twin), name


def test_one_weight_is_decoded_as_dequantize_does(guard):
    for block_size, shape in ((32, (3, 96)), (256, (9, 1024)), (64, (130, 128))):
        weight = make_weight(guard, shape, block_size=block_size)
        found = step.decode_columns([weight], [None], guard.empty(shape, torch.bfloat16, DEVICE))
        assert torch.equal(found, reference.dequantize(weight, torch.empty_like(found)))


def test_weights_of_different_formats_do_not_go_together(guard):
    a, b = group(guard, rows=(8, 8))[:2]
    plain = make_weight(guard, (8, 128), nested=False)._replace(code=a.code)
    other_width = make_weight(guard, (8, 64))._replace(code=a.code, nested_map=a.nested_map)
    ragged = PackedWeight(a.packed, a.absmax, a.code, (8, 100), 64)
    assert go_together([a, b])
    assert not go_together([a, plain])
    assert not go_together([a, other_width])
    assert not go_together([ragged])
