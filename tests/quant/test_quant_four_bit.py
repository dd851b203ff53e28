"""The laws of NF4 (promises R1 to R6), each stated so that it can fail."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import lorax
from lorax.errors import QuantizationError
from lorax.quant import blockwise, codebooks
from lorax.quant.linear import QuantizedLinear

FORMATS = ("nf4", "nf4-dq")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_GAP = 0.15190360  # half the widest distance between neighbouring NF4 values
WIDEST_DYNAMIC_GAP = 0.00703127  # the same of the dynamic map: half of 0.9 / 64, and an ulp


def nearest_codes(y: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """A nearest search by counting float32 midpoints below y; a tie goes down."""
    boundaries = (code[:-1] + code[1:]) / 2
    return (y[:, None] > boundaries).sum(1).to(torch.uint8)


def weights(n, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * scale).to(dtype)


shapes = st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(
    lambda shape: math.prod(shape) < 20_000
)
seeds = st.integers(0, 2**31)


def derive_nf4(offset: float = 0.9677083) -> torch.Tensor:
    """The 16 values from the normal distribution's quantiles: (16,) float64, ascending.

    `offset` is the outermost probability, printed with seven digits in the QLoRA code.
    """

    def side(count):
        probabilities = torch.linspace(offset, 0.5, count + 1)[:-1]
        return torch.special.ndtri(probabilities.double())

    values = torch.cat([-side(7), torch.zeros(1, dtype=torch.float64), side(8)])
    return (values / values.max()).sort().values


def test_nf4_is_what_its_derivation_gives():
    derived = derive_nf4()
    nf4 = codebooks.four_bit("nf4").double()
    assert (derived - nf4).abs().max() <= 2**-24  # half an ulp below 1
    assert derived.numel() == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_r1_codes_are_the_nearest_for_every_16_bit_pattern(dtype):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    y = patterns[patterns.abs() <= 1].float()
    one = torch.ones(len(y), 1)
    # Each value in a block of its own with a 1, so that the block's scale is 1.
    block = torch.cat([y[:, None], one, torch.zeros(len(y), 30)], dim=1)
    codes, absmax = blockwise.quantize_blockwise(block.flatten(), codebooks.four_bit("nf4"), 32)
    assert torch.equal(absmax, one.flatten())
    assert torch.equal(codes.view(-1, 32)[:, 0], nearest_codes(y, codebooks.four_bit("nf4")))


@given(seeds, st.sampled_from(BLOCK_SIZES))
def test_r1_codes_are_the_nearest_for_float32(seed, block_size):
    x = weights(5000, seed)
    codes, absmax = blockwise.quantize_blockwise(x, codebooks.four_bit("nf4"), block_size)
    y = x * (1 / absmax).repeat_interleave(block_size)[: len(x)]
    assert torch.equal(codes, nearest_codes(y.clamp(-1, 1), codebooks.four_bit("nf4")))


@pytest.mark.parametrize(
    ("block_size", "mean", "sigma"),
    [(32, 0.0677413, 6.8e-5), (64, 0.0728023, 8.1e-5), (128, 0.0768355, 8.7e-5)],
)
def test_r1_mean_error_on_a_normal_distribution_is_the_known_one(block_size, mean, sigma):
    x = weights(10**6, seed=7)
    error = (lorax.quantize(x, "nf4", block_size).dequantize() - x).abs().mean().item()
    assert abs(error - mean) <= 4 * sigma


@given(shapes, seeds, st.sampled_from(BLOCK_SIZES), st.floats(-30, 30))
def test_r2_each_value_is_within_half_the_widest_gap(shape, seed, block_size, exponent):
    x = weights(math.prod(shape), seed, scale=10**exponent).view(shape)
    q = lorax.quantize(x, "nf4", block_size)
    absmax = q.scales().repeat_interleave(block_size)[: x.numel()]
    error = (q.dequantize() - x).flatten().double().abs()
    assert (error <= WIDEST_GAP * absmax.double() * (1 + 2**-22)).all()


def test_r2_at_the_midpoints_a_value_can_fall_to_the_farther_side():
    """What is drawn above never comes so near to a tie that its own rounding decides.

    x / absmax is computed in float32, as bitsandbytes does (R4), and so an x within 2^-22 of the
    midpoint can get the farther neighbour: the bound there is 2^-20 above half the gap.
    """
    code = codebooks.four_bit("nf4").double()
    for absmax in torch.linspace(0.1, 2.0, 300).unsqueeze(1):
        ties = ((code[1:] + code[:-1]) / 2 * absmax.double()).float()
        x = torch.cat([absmax, ties, ties.nextafter(absmax), ties.nextafter(-absmax)])
        error = (lorax.quantize(x, "nf4").dequantize() - x).double().abs()
        assert (error <= WIDEST_GAP * absmax.double() * (1 + 2**-20)).all()


@given(shapes, seeds, st.sampled_from(BLOCK_SIZES))
def test_r2_with_double_quantization_the_scales_error_comes_on_top(shape, seed, block_size):
    x = weights(math.prod(shape), seed).view(shape)
    q = lorax.quantize(x, "nf4-dq", block_size)
    plain = lorax.quantize(x, "nf4", block_size)
    absmax = plain.scales().repeat_interleave(block_size)[: x.numel()].double()
    absmax2 = q.nested.absmax.repeat_interleave(256 * block_size)[: x.numel()].double()
    code = codebooks.four_bit("nf4")[q.codes().long()].double().abs()
    error = (q.dequantize() - x).flatten().double().abs()
    bound = WIDEST_GAP * absmax * (1 + 2**-22) + code * WIDEST_DYNAMIC_GAP * absmax2
    assert (error <= bound).all()


@given(shapes, seeds, st.sampled_from((32, 64, 256)), st.sampled_from(DTYPES))
def test_r3_quantizing_again_changes_no_bit(shape, seed, block_size, dtype):
    x = weights(math.prod(shape), seed, dtype).view(shape)
    once = lorax.quantize(x, "nf4", block_size)
    again = lorax.quantize(once.dequantize(), "nf4", block_size)
    assert torch.equal(once.packed, again.packed)
    assert torch.equal(once.absmax, again.absmax)


@given(shapes, seeds, st.integers(-40, 40))
def test_r3_a_power_of_two_scales_absmax_alone(shape, seed, k):
    x = weights(math.prod(shape), seed).view(shape)
    one, two = lorax.quantize(x, "nf4"), lorax.quantize(x * 2.0**k, "nf4")
    assert torch.equal(one.packed, two.packed)
    assert torch.equal(one.absmax * 2.0**k, two.absmax)


@given(st.integers(1, 40), seeds, st.sampled_from((32, 128)))
def test_r3_blocks_permute(blocks, seed, block_size):
    x = weights(blocks * block_size, seed).view(blocks, block_size)
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    one, two = (lorax.quantize(t, "nf4", block_size) for t in (x, x[order]))
    assert torch.equal(one.dequantize()[order], two.dequantize())


@given(st.integers(1, 60), st.integers(1, 60), seeds, st.sampled_from(FORMATS))
def test_r3_strided_equals_contiguous(rows, columns, seed, format):
    wide = weights(rows * columns * 2, seed).view(columns, rows * 2)
    strided = wide[:, ::2].t()
    assert torch.equal(
        lorax.quantize(strided, format).dequantize(),
        lorax.quantize(strided.contiguous(), format).dequantize(),
    )


@given(st.integers(1, 9000), seeds, st.sampled_from((32, 64)), st.integers(1, 8))
def test_r3_any_chunking_gives_the_same_bits(n, seed, block_size, blocks_a_chunk):
    x = weights(n, seed)
    whole = lorax.quantize(x, "nf4-dq", block_size)
    out = whole.dequantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "CHUNK_ELEMENTS", blocks_a_chunk * block_size)
        patch.setattr("lorax.quant.four_bit.CHUNK_ELEMENTS", blocks_a_chunk * block_size)
        patch.setattr("lorax.quant.decode.DECODE_ELEMENTS", blocks_a_chunk * block_size)
        parts = lorax.quantize(x, "nf4-dq", block_size)
        assert torch.equal(parts.dequantize(), out)
    for one, other in zip(whole.tensors(), parts.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 127, 128, 129, 6399, 6400, 6401])
def test_r5_any_number_of_values(n, format):
    x = weights(n, seed=n)
    q = lorax.quantize(x, format)
    assert q.packed.numel() == (n + 1) // 2
    assert q.absmax.numel() == -(-n // 64)
    back = q.dequantize()
    assert back.shape == x.shape
    if n:
        assert (back - x).abs().max() <= 0.17 * x.abs().max()


@given(shapes, st.sampled_from(DTYPES), st.sampled_from(FORMATS))
def test_r5_zero_blocks_give_exact_zeros(shape, dtype, format):
    zeros = torch.zeros(shape, dtype=dtype)
    q = lorax.quantize(zeros, format)
    assert torch.equal(q.dequantize(), zeros)
    assert (q.packed == 119).all()


def test_r5_denormals_and_the_largest_float16():
    tiny = torch.full((64,), 1e-42)
    assert (lorax.quantize(tiny, "nf4").dequantize() <= tiny).all()
    largest = torch.full((64,), 65504.0, dtype=torch.float16)
    assert torch.equal(lorax.quantize(largest, "nf4").dequantize(), largest)
    huge = torch.tensor([3e38, -3e38, 1e38])
    assert torch.isfinite(lorax.quantize(huge, "nf4").dequantize()).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.complex64, torch.bool])
def test_r5_a_wrong_dtype_names_the_tensor(dtype):
    with pytest.raises(QuantizationError, match=r"layers\.3\.up_proj.*float32, float16"):
        lorax.quantize(torch.zeros(64, dtype=dtype), "nf4", name="layers.3.up_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_r6_a_value_that_is_not_finite_is_counted_and_placed(bad):
    x = torch.zeros(5, 7)
    x[2, 3] = x[4, 1] = bad
    with pytest.raises(QuantizationError, match=r"up: 2 of 35 values .*\[2, 3\]"):
        lorax.quantize(x, "nf4", name="up")


@pytest.mark.parametrize(("format", "block_size"), [("nf5", 64), ("nf4", 48), ("nf4", 8192)])
def test_a_format_or_block_size_that_is_unknown_is_refused(format, block_size):
    with pytest.raises(QuantizationError, match="expected one of"):
        lorax.quantize(torch.zeros(64), format, block_size)


def test_bits_a_weight():
    x = weights(2**20, seed=0).view(1024, 1024)
    assert lorax.quantize(x, "nf4").nbytes * 8 / x.numel() == 4.5
    bits = lorax.quantize(x, "nf4-dq").nbytes * 8 / x.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)  # and the offset


@given(shapes, seeds, st.sampled_from(DTYPES), st.sampled_from(FORMATS))
def test_dequantize_into_a_buffer(shape, seed, dtype, format):
    q = lorax.quantize(weights(math.prod(shape), seed, dtype).view(shape), format)
    for wanted in DTYPES:
        out = torch.full(shape, float("nan"), dtype=wanted)
        assert q.dequantize(out=out) is out
        assert torch.equal(out, q.dequantize(wanted))
        assert torch.equal(out, q.dequantize(torch.float32).to(wanted))  # one rounding


def test_dequantize_refuses_a_buffer_that_does_not_fit():
    q = lorax.quantize(torch.randn(4, 6), "nf4")
    for out in (torch.empty(6, 4), torch.empty(6, 4).t(), torch.empty(24)):
        with pytest.raises(QuantizationError, match="expected a contiguous"):
            q.dequantize(out=out)


@given(seeds, st.sampled_from(FORMATS), st.booleans())
def test_linear_against_its_dense_self_forward_and_gradient(seed, format, bias):
    W, b = weights(37 * 29, seed).view(37, 29), weights(37, seed + 1) if bias else None
    layer = QuantizedLinear(lorax.quantize(W, format), b)
    dense = layer.dense()
    x = weights(2 * 5 * 29, seed + 2).view(2, 5, 29)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = layer(one), dense(two)
    assert torch.equal(y1, y2)
    dy = weights(y1.numel(), seed + 3).view(y1.shape)
    y1.backward(dy)
    y2.backward(dy)
    assert torch.allclose(one.grad, two.grad, rtol=1e-6, atol=1e-5)
    assert all(not p.requires_grad for p in layer.parameters())


def test_linear_keeps_its_codes_when_the_module_changes_dtype():
    q = lorax.quantize(torch.randn(16, 64), "nf4-dq")
    layer = QuantizedLinear(q, torch.zeros(16)).to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for one, other in zip(layer.quantized.tensors(), q.tensors(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", FORMATS)
def test_linear_state_dict_round_trip(format):
    source = QuantizedLinear(lorax.quantize(torch.randn(16, 64), format), torch.randn(16))
    target = QuantizedLinear(lorax.quantize(torch.zeros(16, 64), format), torch.zeros(16))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.quantized.dequantize(), target.quantized.dequantize())
    assert torch.equal(source.bias, target.bias)


def test_layers_of_one_model_share_the_scratch_but_not_their_results():
    layers = [QuantizedLinear(lorax.quantize(torch.randn(8, 32), "nf4")) for _ in range(3)]
    x = torch.randn(4, 32, requires_grad=True)
    ys = [layer(x) for layer in layers]
    sum(y.square().sum() for y in ys).backward()
    dense = [layer.quantized.dequantize() for layer in layers]
    expected = sum(2 * (x.detach() @ W.t()) @ W for W in dense)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("double", [False, True])
def test_r6_allowed_it_spoils_its_own_block_only(kind, bad, double, caplog):
    x = weights(64 * 40, seed=3).view(40, 64)
    clean = lorax.quantize(x, kind).dequantize()
    x[7, 5] = bad
    format = f"{kind}-dq" if double else kind
    back = lorax.quantize(x, format, name="up", nonfinite="allow").dequantize()
    others = torch.arange(40) != 7
    assert torch.equal(back[others], clean[others])
    assert not torch.isfinite(back[7]).all()
    assert [r.getMessage().split(":")[0] for r in caplog.records] == (["up"] if double else [])
    with pytest.raises(QuantizationError, match="nonfinite"):
        lorax.quantize(x, format, nonfinite="perhaps")


def relative_row_errors(q, x):
    return (q.dequantize() - x).double().norm(dim=1) / x.double().norm(dim=1)


@pytest.mark.parametrize("columns", [64, 128, 576])
def test_r7_rows_of_small_weights_survive_double_quantization(columns, caplog):
    x = weights(256 * columns, seed=1).view(256, columns)
    x[::8] *= 1e-3
    q = lorax.quantize(x, "nf4-dq", name="layers.0.up_proj")
    small = x[::8]
    assert (q.dequantize()[::8] - small).norm() / small.norm() <= 0.10
    plain = lorax.quantize(x, "nf4")
    assert torch.equal(relative_row_errors(q, x), relative_row_errors(plain, x))
    assert q.format == "nf4"
    (record,) = caplog.records
    assert record.getMessage().startswith("layers.0.up_proj: ")
    assert "\n" not in record.getMessage()


@given(
    st.integers(1, 40), st.sampled_from([32, 64, 96, 33, 576]), st.floats(0, 6), seeds,
    st.sampled_from((32, 64, 128)),
)  # fmt: skip
def test_r7_whatever_the_scales_the_second_level_costs_little(rows, columns, spread, seed, block):
    """The promise itself, measured with plain arithmetic instead of the code's three sums."""
    generator = torch.Generator().manual_seed(seed)
    x = weights(rows * columns, seed).view(rows, columns)
    x *= 10 ** (-spread * torch.rand(rows, 1, generator=generator))
    plain, double = (relative_row_errors(lorax.quantize(x, f, block), x) for f in FORMATS)
    floor = 0.01  # an error below it counts as that
    rms_plain, rms_double = (e.square().mean().sqrt() for e in (plain, double))
    assert rms_double <= 1.05 * rms_plain.clamp_min(floor)
    assert (double <= 2 * plain.clamp_min(floor)).all()


def test_r7_ordinary_weights_do_get_double_quantization(smollm2):
    for name, module in smollm2.named_modules():
        if name.endswith(("layers.0.self_attn.q_proj", "layers.29.mlp.down_proj")):
            assert lorax.quantize(module.weight, "nf4-dq").format == "nf4-dq"


@pytest.mark.nightly
def test_r8_more_than_2_31_values():
    """The last block of a tensor that no int32 can index."""
    psutil = pytest.importorskip("psutil")
    if psutil.virtual_memory().available < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    n = 2**31 + 65
    x = torch.zeros(n, dtype=torch.bfloat16)
    tail = weights(129, seed=0, dtype=torch.bfloat16)
    x[-129:] = tail
    q = lorax.quantize(x, "nf4")
    expected = lorax.quantize(x[-129:], "nf4")  # n - 129 is a multiple of 64
    assert (n - 129) % 64 == 0
    assert torch.equal(q.packed[-65:], expected.packed)
    assert torch.equal(q.absmax[-3:], expected.absmax)
    back = q.dequantize()
    assert torch.equal(back[-129:], expected.dequantize())
    assert not back[:-129].any()
