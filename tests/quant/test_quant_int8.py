"""LLM.int8 against bitsandbytes, and the laws of the affine integers."""

import copy
import math

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from oracles import gpt2, llama, tokens
from pydantic import TypeAdapter, ValidationError
from torch import nn

import lorax
from lorax.errors import QuantizationError, UsageError
from lorax.models.replace import replace_module
from lorax.quant import affine, blockwise, int8, names
from lorax.quant.linear import QuantizedLinear
from lorax.training.sections import Quantization

AFFINE = affine.FORMATS
NEW = ("int8", *AFFINE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Half a step, and what the short scale may miss at a block's ends (see blockwise.py): half of
# 255 * 2^-16 of a step for 8 bits, of 15 * 2^-20 for 4; 2^-15 for float32's quotient x / scale.
BOUND = {8: 0.5 + 255 * 2**-17 + 2**-15, 4: 0.5 + 15 * 2**-21 + 2**-19}

seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(
    lambda shape: math.prod(shape) < 20_000
)
matrices = st.tuples(st.integers(1, 90), st.integers(1, 300))


def draw(shape, seed=0, dtype=torch.float32, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def activations(rows, columns, seed, dtype, outliers):
    """Normal rows, in which `outliers` columns hold values around 30 here and there."""
    x = draw((rows, columns), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for column in torch.randint(columns, (outliers,), generator=generator).tolist():
        x[seed % rows :: 3, column] += 30
    return x.to(dtype)


def bitsandbytes_linear(W, bias=None):
    """bitsandbytes' Linear8bitLt as transformers builds it, quantized on the CPU, in eval mode."""
    layer = bnb.nn.Linear8bitLt(
        W.shape[1], W.shape[0], bias=bias is not None, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu").eval()


def scheme_in_float64(x, q, bias=None):
    """What LLM.int8 defines, with nothing rounded but the codes and the scales."""
    codes, scales, columns = int8.quantize_activations(x, 6.0)
    y = (codes.long() @ q.codes.long().t()).double()
    y = y * scales[:, None].double() * q.SCB.double() / 127**2
    W = q.codes[:, columns].double() * q.SCB[:, None].double() / 127
    y = y + x[:, columns].double() @ W.t()
    return y if bias is None else y + bias.double()


# LLM.int8 against bitsandbytes


@given(matrices, seeds, st.sampled_from(DTYPES), st.integers(-6, 3))
def test_int8_weights_against_bitsandbytes(shape, seed, dtype, exponent):
    W = draw(shape, seed, dtype, 10.0**exponent)
    W[:: 1 + seed % 7] = 0  # rows of zeros, by which bitsandbytes divides
    mine = lorax.quantize(W, "int8")
    codes, scales, _ = bnb_functional.int8_vectorwise_quant(W.to(torch.float16))
    assert torch.equal(mine.codes, codes)
    assert torch.equal(mine.SCB, scales)
    theirs = bnb_functional.int8_vectorwise_dequant(codes, scales)
    for wanted in DTYPES:
        assert torch.equal(mine.dequantize(wanted), theirs.to(wanted))


@given(matrices, seeds, st.sampled_from(DTYPES), st.integers(0, 4))
def test_int8_activations_against_bitsandbytes(shape, seed, dtype, outliers):
    x = activations(*shape, seed, dtype, outliers)
    mine = int8.quantize_activations(x, 6.0)
    theirs = bnb_functional.int8_vectorwise_quant(x.to(torch.float16), threshold=6.0)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)


@given(matrices, st.integers(1, 9), seeds, st.sampled_from(DTYPES), st.integers(0, 4))
def test_int8_linear_is_the_scheme_up_to_one_rounding(shape, rows, seed, dtype, outliers):
    W, bias = draw(shape, seed, dtype), draw(shape[:1], seed + 1, dtype)
    x = activations(rows, shape[1], seed, dtype, outliers)
    layer = QuantizedLinear(lorax.quantize(W, "int8"), bias)
    truth = scheme_in_float64(x, layer.quantized, bias)
    # Float32's roundings of the scaled integers and of the sum over the outlier columns, relative
    # to the sizes that are added; then one to x's dtype.
    size = scheme_in_float64(x.abs(), lorax.quantize(W.abs(), "int8"), bias.abs())
    bound = (8 + outliers) * 2**-24 * size + torch.finfo(dtype).eps / 2 * truth.abs()
    assert ((layer(x).double() - truth).abs() <= bound * (1 + 2**-7)).all()


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_against_bitsandbytes_linear8bitlt(dtype, outliers):
    """Against the scheme in float64 lorax is nearer; against x W^T in float64, no further."""
    W, bias = draw((96, 512), 1, dtype), draw((96,), 2, dtype)
    x = activations(64, 512, 3, dtype, outliers)
    mine = QuantizedLinear(lorax.quantize(W, "int8"), bias)
    y, theirs = mine(x).double(), bitsandbytes_linear(W, bias)(x).double()
    scheme = scheme_in_float64(x, mine.quantized, bias)
    product = F.linear(x.double(), W.double(), bias.double())
    assert rms(y - scheme) <= rms(theirs - scheme)
    assert rms(y - product) <= rms(theirs - product) * 1.001  # both are mostly the codes' error
    assert rms(y - product) <= 0.012 * rms(product)
    # As close as two roundings to x's dtype, and the slip in bitsandbytes' constant.
    assert rms(y - theirs) <= (torch.finfo(dtype).eps + 2e-5) * rms(product)


def rms(x):
    return x.double().square().mean().sqrt().item()


def test_bitsandbytes_constant_is_off_by_a_digit():
    """lorax is right: the exact product of two codes and two scales of 127 is a whole number."""
    x, W = torch.full((1, 4), 5.0), torch.full((1, 4), 3.0)
    assert QuantizedLinear(lorax.quantize(W, "int8"))(x).item() == pytest.approx(60, rel=3e-7)
    assert bitsandbytes_linear(W)(x).item() / 60 - 1 == pytest.approx(1.8e-5, rel=0.02)


def test_bitsandbytes_on_a_cpu_trains_on_another_function_and_lorax_does_not():
    W, x = draw((48, 128), 1), activations(8, 128, 2, torch.float32, 2)
    mine, theirs = QuantizedLinear(lorax.quantize(W, "int8")), bitsandbytes_linear(W)
    dense = mine.dense()(x)
    assert torch.allclose(theirs.train()(x), dense, rtol=1e-5, atol=1e-4)  # MatMul8bitFp
    assert not torch.allclose(theirs.eval()(x), dense, rtol=1e-5, atol=1e-3)  # MatMul8bitLt
    assert torch.equal(mine.train()(x), mine.eval()(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_gradient_against_bitsandbytes(dtype, training):
    W, dy = draw((48, 128), 1, dtype), draw((2, 9, 48), 2, dtype)
    layers = [QuantizedLinear(lorax.quantize(W, "int8")), bitsandbytes_linear(W)]
    grads = []
    for layer in layers:
        x = activations(18, 128, 3, dtype, 2).view(2, 9, 128).requires_grad_()
        layer.train(training)(x).backward(dy)
        grads.append(x.grad)
    # The two differ by one rounding of W: bitsandbytes takes code * (SCB / 127).
    truth = dy.double() @ layers[0].quantized.dequantize(torch.float32).double()
    assert rms(grads[0] - truth) <= 1.05 * rms(grads[1] - truth)
    assert torch.allclose(grads[0], grads[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-5) or (
        dtype != torch.float32 and rms(grads[0] - grads[1]) <= torch.finfo(dtype).eps * rms(truth)
    )


def test_int8_state_dict_against_bitsandbytes_both_ways():
    W, bias, x = draw((32, 64), 1), draw((32,), 2), draw((5, 64), 3)
    theirs, mine = bitsandbytes_linear(W, bias), QuantizedLinear(lorax.quantize(W, "int8"), bias)
    one, other = mine.state_dict(), theirs.state_dict()
    assert set(one) == set(other) == {"weight", "SCB", "weight_format", "bias"}
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    blank = QuantizedLinear(lorax.quantize(torch.zeros(32, 64), "int8"), torch.zeros(32))
    blank.load_state_dict(other)
    assert torch.equal(blank(x), mine(x))
    fresh = bitsandbytes_linear(torch.zeros(32, 64), torch.zeros(32))
    expected = theirs(x)
    fresh.load_state_dict(one)
    assert torch.equal(fresh(x), expected)


# LLM.int8: laws


@pytest.mark.parametrize("fill", [127, -127, -128])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (3, 1, 5), (3, 1025, 5), (18, 4096, 33), (0, 8, 3)]
)
def test_integer_products_are_exact(m, k, n, fill):
    """Also with the largest codes, where float32 would round the whole sum."""
    generator = torch.Generator().manual_seed(k)
    b = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    a = torch.full((m, k), fill, dtype=torch.int8)
    b[:1] = fill
    a[:, :1] = 1  # so that the sum is no multiple of a high power of two
    truth = (a.long() @ b.long().t()).int()
    assert torch.equal(int8.integer_matmul(a, b), truth)
    assert torch.equal(int8.float_integer_matmul(a, b), truth)


@given(matrices, seeds, st.sampled_from(DTYPES))
def test_int8_is_within_half_a_step_and_quantizing_again_changes_no_bit(shape, seed, dtype):
    W = draw(shape, seed, dtype)
    q = lorax.quantize(W, "int8")
    step = q.SCB[:, None].double() / 127
    error = (q.dequantize(torch.float32).double() - W.to(torch.float16).double()).abs()
    assert (error <= step / 2 * (1 + 2**-15)).all()  # 127 roundings of the quotient, at most
    again = lorax.quantize(q.dequantize(), "int8")
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.SCB, q.SCB)


@given(st.integers(1, 20), seeds)
def test_int8_rows_do_not_touch_each_other_without_outliers(rows, seed):
    layer = QuantizedLinear(lorax.quantize(draw((24, 96), 5), "int8"))
    x = draw((rows, 96), seed).clamp(-5, 5)
    together = layer(x)
    for i in range(rows):
        assert torch.equal(layer(x[i]), together[i])


def test_int8_outlier_columns_keep_their_precision():
    """The paper's point: with a few large columns, the plain vector-wise product falls apart."""
    W, x = draw((64, 256), 1), activations(16, 256, 2, torch.float32, 3)
    x[:, 7] = 500.0
    q, product = lorax.quantize(W, "int8"), x @ W.t()
    rest = (x.abs() < 6).all(0)
    small = x[:, rest] @ W[:, rest].t()
    with_columns = int8.linear(x, q, None) - (product - small)
    without = int8.linear(x, q, None, threshold=math.inf) - (product - small)
    exact = x @ q.dequantize().t() - product  # what the weight's own codes cost
    assert rms(with_columns - small - exact) <= 0.02 * rms(small)
    assert rms(without - small - exact) >= 0.5 * rms(small)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_int8_a_bad_activation_spoils_its_own_row_or_is_an_outlier(bad):
    layer = QuantizedLinear(lorax.quantize(draw((24, 96), 5), "int8"))
    x = draw((4, 96), 6)
    x[2, 3] = bad
    y, expected = layer(x), x @ layer.quantized.dequantize().t()
    good = torch.tensor([0, 1, 3])
    assert rms(y[good] - expected[good]) <= 0.02 * rms(expected[good])
    if bad == 1e6:  # beyond float16, and exact all the same
        assert rms(y[2] - expected[2]) <= 1e-5 * rms(expected[2])
    else:
        assert not torch.isfinite(y[2]).any()


def test_int8_refuses_what_it_cannot_hold():
    with pytest.raises(QuantizationError, match=r"up: int8 needs a matrix .*\(4,\)"):
        lorax.quantize(torch.zeros(4), "int8", name="up")
    with pytest.raises(QuantizationError, match=r"up: values up to 70000 .*int8-symmetric"):
        lorax.quantize(torch.tensor([[1.0, 7e4]]), "int8", name="up")
    with pytest.raises(QuantizationError, match="per-row scales; remove block_size"):
        lorax.quantize(torch.zeros(4, 4), "int8", 64)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 1)])
def test_int8_of_small_and_empty_matrices(shape):
    layer = QuantizedLinear(lorax.quantize(torch.ones(shape), "int8"))
    for leading in ((), (0,), (2, 3, 4)):
        x = torch.ones(*leading, shape[1])
        y = layer(x)
        assert y.shape == (*leading, shape[0])
        assert torch.allclose(y, torch.full_like(y, shape[1]))


# Affine integers: laws


def per_value(per_block, x, block_size):
    return per_block.repeat_interleave(block_size)[: x.numel()].double()


@given(
    shapes, seeds, st.sampled_from(AFFINE), st.sampled_from(blockwise.BLOCK_SIZES),
    st.integers(-25, 30), st.floats(-4, 4),
)  # fmt: skip
def test_r2_each_value_is_within_half_a_step(shape, seed, format, block_size, exponent, lean):
    x = draw(shape, seed, scale=10.0**exponent, shift=lean * 10.0**exponent)
    q = lorax.quantize(x, format, block_size)
    step = per_value(q.scales, x, block_size)
    error = (q.dequantize().double() - x.double()).abs().flatten()
    assert (error <= BOUND[q.bits] * step).all()
    # And the steps are no longer than they must be: the grid spans the block and no more.
    for block, scale in zip(x.flatten().split(block_size), q.scales.tolist(), strict=x.numel() > 0):
        high, low = max(block.max().item(), 0), min(block.min().item(), 0)
        levels = 2**q.bits - (1 if q.zero_points is not None else 2)
        span = high - low if q.zero_points is not None else 2 * max(high, -low)
        assert scale <= max(span / levels * (1 + 2**-15), 2**-120)


@given(seeds, st.floats(-3, 3), st.sampled_from(["int4-symmetric", "int4-affine"]))
def test_r1_codes_are_the_nearest_of_all(seed, lean, format):
    x = draw(640, seed, shift=lean)
    q = lorax.quantize(x, format)
    zeros = q.zero_points if q.zero_points is not None else torch.zeros(10, dtype=torch.int8)
    grid = torch.arange(-8, 8) if format == "int4-affine" else torch.arange(-7, 8)
    points = (grid[None] - zeros[:, None].long()) * q.scales[:, None].double()  # (blocks, codes)
    nearest = (x.view(10, 64, 1).double() - points[:, None]).abs().amin(2)
    error = (q.dequantize().double() - x.double()).abs().view(10, 64)
    # An end may take its end code although another is nearer by that much.
    assert (error <= nearest + 15 * 2**-19 * q.scales[:, None]).all()


@given(shapes, seeds, st.sampled_from(AFFINE), st.sampled_from((32, 64, 256)), st.floats(-4, 4))
def test_r3_integers_quantized_again_change_no_bit(shape, seed, format, block_size, lean):
    x = draw(shape, seed, shift=lean)
    once = lorax.quantize(x, format, block_size)
    again = lorax.quantize(once.dequantize(), format, block_size)
    for one, other in zip(once.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other)


def test_r3_a_block_whose_ends_lie_between_two_codes_keeps_its_width():
    once = lorax.quantize(torch.tensor([-4.5, 10.5]), "int4-affine")  # scale 1
    assert once.codes().tolist() == [-8, 7]  # and not 6, to which 10.5 would round
    again = lorax.quantize(once.dequantize(), "int4-affine")
    assert torch.equal(once.scales, again.scales)
    assert torch.equal(once.packed, again.packed)


@given(shapes, seeds, st.sampled_from(AFFINE), st.integers(-40, 40), st.floats(-4, 4))
def test_r3_a_power_of_two_scales_the_scales_alone(shape, seed, format, k, lean):
    x = draw(shape, seed, shift=lean)
    one, two = lorax.quantize(x, format), lorax.quantize(x * 2.0**k, format)
    assert torch.equal(one.packed, two.packed)
    assert torch.equal(one.scales * 2.0**k, two.scales) or not x.any()
    if one.zero_points is not None:
        assert torch.equal(one.zero_points, two.zero_points)


@given(st.integers(1, 40), seeds, st.sampled_from(AFFINE))
def test_r3_blocks_of_integers_permute(blocks, seed, format):
    x = draw((blocks, 64), seed)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    one, two = lorax.quantize(x, format), lorax.quantize(x[order], format)
    assert torch.equal(one.dequantize()[order], two.dequantize())


@given(st.integers(1, 60), st.integers(1, 60), seeds, st.sampled_from(NEW))
def test_r3_strided_weights_equal_contiguous_ones(rows, columns, seed, format):
    strided = draw((columns, rows * 2), seed)[:, ::2].t()
    assert torch.equal(
        lorax.quantize(strided, format).dequantize(),
        lorax.quantize(strided.contiguous(), format).dequantize(),
    )


@given(st.integers(1, 90), st.integers(1, 90), seeds, st.sampled_from(NEW), st.integers(1, 8))
def test_r3_any_chunking_of_integers_gives_the_same_bits(rows, columns, seed, format, blocks):
    x = draw((rows, columns), seed)
    whole = lorax.quantize(x, format)
    out = whole.dequantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "CHUNK_ELEMENTS", blocks * 64)
        patch.setattr(int8, "CHUNK_ELEMENTS", blocks * 64)
        parts = lorax.quantize(x, format)
        assert torch.equal(parts.dequantize(), out)
    for one, other in zip(whole.tensors(), parts.tensors(), strict=True):
        assert torch.equal(one, other)


@given(seeds, st.sampled_from(AFFINE), st.floats(-4, 4), st.sampled_from(DTYPES))
def test_zero_comes_back_as_zero(seed, format, lean, dtype):
    x = draw(500, seed, dtype, shift=lean)
    x[seed % 7 :: 7] = 0
    assert (lorax.quantize(x, format).dequantize()[x == 0] == 0).all()


@given(seeds, st.floats(-30, 30))
def test_the_zero_point_belongs_to_the_signed_range(seed, lean):
    """A block far from zero puts its zero point at an end of -8 ... 7, not of 0 ... 15."""
    for bits, format in ((4, "int4-affine"), (8, "int8-affine")):
        q = lorax.quantize(draw(640, seed, shift=lean), format)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert low <= q.zero_points.min() <= q.zero_points.max() <= high
        assert low <= q.codes().min() <= q.codes().max() <= high
        if abs(lean) > 10:
            assert (q.zero_points == (low if lean > 0 else high)).all()


def test_a_zero_point_pays_where_blocks_lean():
    x = draw(64_000, 3).abs()
    errors = {f: rms(lorax.quantize(x, f).dequantize() - x) for f in AFFINE}
    assert errors["int4-affine"] < 0.52 * errors["int4-symmetric"]  # 15 steps where there were 7
    assert errors["int8-affine"] < 0.52 * errors["int8-symmetric"]


@given(st.integers(0, 400), seeds)
def test_int4_packs_two_a_byte_the_earlier_in_the_high_half(n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n,), generator=generator).to(torch.int8)
    packed = affine.pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (n + 1) // 2
    assert torch.equal(affine.unpack_nibbles(packed, n), codes)
    if n > 1:
        assert packed[0] == (codes[0].item() % 16) * 16 + codes[1].item() % 16


@pytest.mark.parametrize("format", AFFINE)
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 127, 6399, 6401])
def test_r5_any_number_of_integers(n, format):
    x = draw(n, n)
    q = lorax.quantize(x, format)
    assert q.scales.numel() == -(-n // 64)
    assert q.packed.numel() == (n if q.bits == 8 else (n + 1) // 2)
    assert q.dequantize().shape == x.shape


@given(shapes, st.sampled_from(DTYPES), st.sampled_from(AFFINE))
def test_r5_zero_blocks_of_integers_give_exact_zeros(shape, dtype, format):
    zeros = torch.zeros(shape, dtype=dtype)
    q = lorax.quantize(zeros, format)
    assert torch.equal(q.dequantize(), zeros)
    assert torch.isfinite(q.scales).all()


@pytest.mark.parametrize("format", AFFINE)
def test_r5_denormals_and_the_largest_numbers(format):
    tiny = torch.tensor([1e-42, -3e-42, 2e-45] * 30)
    q = lorax.quantize(tiny, format)
    assert (q.dequantize() - tiny).abs().max() <= q.scales.max() / 2
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        x = draw(640, 1).clamp(-1, 1).mul(largest).to(dtype)
        back = lorax.quantize(x, format).dequantize()
        assert torch.isfinite(back).all()
        assert rms(back.double() / largest - x.double() / largest) <= 0.05


@pytest.mark.parametrize("format", NEW)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_r6_a_value_that_is_not_finite_is_named_or_spoils_its_own_block(bad, format):
    x = draw((8, 64), 1)
    x[2, 3] = x[5, 1] = bad
    with pytest.raises(QuantizationError, match=r"up: 2 of 512 values .*\[2, 3\]"):
        lorax.quantize(x, format, name="up")
    back = lorax.quantize(x, format, nonfinite="allow").dequantize()
    spoiled = torch.zeros(8, dtype=torch.bool)
    spoiled[[2, 5]] = True
    assert not torch.isfinite(back[spoiled]).any()
    clean = lorax.quantize(x.nan_to_num(0, 0, 0), format).dequantize()
    assert torch.equal(back[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("format", NEW)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.complex64, torch.bool])
def test_r5_a_dtype_that_is_no_float_names_the_tensor(dtype, format):
    with pytest.raises(QuantizationError, match=r"layers\.3\.up_proj.*float32, float16"):
        lorax.quantize(torch.zeros(8, 8, dtype=dtype), format, name="layers.3.up_proj")


# The face, for every format


@pytest.mark.parametrize(
    ("format", "bits"),
    [("int8", 8 + 32 / 1024), ("int8-symmetric", 8.5), ("int8-affine", 8.625),
     ("int4-symmetric", 4.5), ("int4-affine", 4.625)],
)  # fmt: skip
def test_bits_a_weight_of_integers(format, bits):
    assert lorax.quantize(torch.ones(256, 1024), format).nbytes * 8 / 2**18 == bits


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), seeds, st.sampled_from(names.formats()))
def test_every_format_shows_the_same_face(shape, seed, format):
    for dtype in DTYPES:
        q = lorax.quantize(draw(shape, seed, dtype), format)
        assert isinstance(q, lorax.QuantizedTensor)
        assert (q.format, q.shape, q.dtype) == (format, shape, dtype)
        assert q.nbytes == sum(t.nbytes for t in q.tensors())
        assert not q.tensors()[0].is_floating_point()
        assert q.to("cpu").device == q.device == torch.device("cpu")
        for wanted in DTYPES:
            out = torch.full(shape, float("nan"), dtype=wanted)
            assert q.dequantize(out=out) is out
            assert torch.equal(out, q.dequantize(wanted))
            assert torch.equal(out, q.dequantize(torch.float32).to(wanted))  # one rounding
        read = lorax.QuantizedTensor.from_bitsandbytes(q.state_dict(), dtype)
        assert (read.format, read.shape, read.dtype) == (format, shape, dtype)
        for one, other in zip(q.tensors(), read.tensors(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("format", NEW)
def test_dequantize_refuses_a_buffer_that_does_not_fit_integers(format):
    q = lorax.quantize(torch.randn(4, 6), format)
    for out in (torch.empty(6, 4), torch.empty(6, 4).t(), torch.empty(24)):
        with pytest.raises(QuantizationError, match="expected a contiguous"):
            q.dequantize(out=out)


@pytest.mark.parametrize("format", AFFINE)
def test_bitsandbytes_has_no_affine_format(format):
    with pytest.raises(QuantizationError, match=f"no format {format}"):
        lorax.quantize(torch.zeros(4, 4), format).to_bitsandbytes()


@pytest.mark.parametrize(
    ("format", "name"),
    [(f, n) for f in NEW for n in lorax.quantize(torch.ones(8, 64), f).state_dict()
     if n != "weight_format"],
)  # fmt: skip
def test_a_missing_or_damaged_integer_tensor_is_named(format, name):
    tensors = lorax.quantize(draw((8, 64)), format).state_dict()
    word = "weight" if name == "SCB" else name.split("lorax__")[0].replace(".", r"\.")
    with pytest.raises(QuantizationError, match=word):
        lorax.QuantizedTensor.from_bitsandbytes({k: v for k, v in tensors.items() if k != name})
    for damaged in (tensors[name].flatten()[:-1], tensors[name].double()):
        with pytest.raises(QuantizationError, match=r"weight|SCB"):
            lorax.QuantizedTensor.from_bitsandbytes({**tensors, name: damaged})


def test_values_that_no_format_writes_are_refused():
    int8 = lorax.quantize(draw((8, 64)), "int8").state_dict()
    int4 = lorax.quantize(draw((8, 64)), "int4-affine").state_dict()
    bad = [
        {**int8, "weight_format": torch.tensor(2, dtype=torch.uint8)},
        {**int8, "SCB": torch.full((8,), math.nan)},
        {**int4, "weight.scales": torch.full((8,), math.inf)},
        {**int4, "weight.zero_points": torch.full((8,), 9, dtype=torch.int8)},
        {**int4, affine.STATE + "int4-affine": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
    ]
    for tensors in bad:
        with pytest.raises(QuantizationError):
            lorax.QuantizedTensor.from_bitsandbytes(tensors)


@given(seeds, st.sampled_from(AFFINE), st.booleans(), st.sampled_from(DTYPES))
def test_affine_linear_against_its_dense_self(seed, format, bias, dtype):
    W, b = draw((37, 29), seed, dtype), draw(37, seed + 1, dtype) if bias else None
    layer = QuantizedLinear(lorax.quantize(W, format), b)
    dense, x = layer.dense(), draw((2, 5, 29), seed + 2, dtype)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = layer(one), dense(two)
    assert torch.equal(y1, y2)
    dy = draw(y1.shape, seed + 3, dtype)
    y1.backward(dy)
    y2.backward(dy)
    assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("format", NEW)
def test_a_linear_of_integers_saves_loads_copies_and_changes_dtype(format):
    layer = QuantizedLinear(lorax.quantize(draw((16, 64), 1), format), draw(16, 2))
    blank = QuantizedLinear(lorax.quantize(torch.zeros(16, 64), format), torch.zeros(16))
    blank.load_state_dict(layer.state_dict())
    x = draw((3, 64), 3)
    assert torch.equal(blank(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for one, other in zip(half.quantized.tensors(), layer.quantized.tensors(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert format in repr(layer)


# Models


def test_recipes_accept_every_format_and_no_other():
    known = TypeAdapter(Quantization)
    for name in names.formats():
        assert known.validate_python(name) == name
    for name in ("nf5", "", "nf4-dq-dq", "int8-dq", "NF4"):
        with pytest.raises(ValidationError, match="should be 'nf4', 'nf4-dq'"):
            known.validate_python(name)


@pytest.mark.parametrize("format", NEW)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_load_model_adapt_merge_and_unmerge(make, format, tmp_path):
    make().save_pretrained(tmp_path)
    model, ids = lorax.load_model(tmp_path, quantization=format), tokens()
    full = lorax.load_model(tmp_path)(ids)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.quantized.format for layer in layers} == {format}
    base = model(ids).detach()
    assert rms(base - full) > 0
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(dense, name, module.dense())
    # Half a step of 1/127 of a row's largest value, in x and three layers deep, against nothing.
    assert rms(base - dense(ids)) <= (0.05 if format == "int8" else 0) * rms(full)

    lorax.add_adapter(model, lorax.LoRAConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model(ids), base)  # B is zero
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.train()
    model(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("lora_" in name), name
    model.eval()
    before = model(ids).detach()
    lorax.merge_adapter(model)
    # A merged int8 layer is dense: its activations are no longer rounded, hence the wider bound.
    assert rms(model(ids) - before) <= (0.05 if format == "int8" else 1e-5) * rms(before)
    lorax.unmerge_adapter(model)
    assert torch.equal(model(ids), before)
    lorax.unload_adapter(model)
    assert torch.equal(model(ids), base)


def test_an_unknown_quantization_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="int4-affine"):
        lorax.load_model(tmp_path, quantization="int3")


def test_a_weight_that_is_not_finite_is_named_while_loading(tmp_path):
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    broken.save_pretrained(tmp_path)
    for format in NEW:
        with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of"):
            lorax.load_model(tmp_path, quantization=format)
