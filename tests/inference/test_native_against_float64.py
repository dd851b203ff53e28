"""native.c held against float64, against the decoder, and against its own slow twins."""

import ctypes

import pytest
import torch
from torch import nn

import lorax
from lorax.adapters.lora import LoRALinear
from lorax.inference import native
from lorax.inference.native import KINDS
from lorax.inference.products import FastLinear, FastNorm, Together
from lorax.inference.rows import RowsCache, attend_native, attend_plain
from lorax.models.gemma2 import GemmaRMSNorm
from lorax.models.llama import RMSNorm
from lorax.models.rope import rotate
from lorax.quant.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a last place, of values near 1
EVERY = [(dtype, M) for dtype in KINDS for M in (1, 2, 3, 5, 8, 16)]
SHAPES = [(7, 20), (64, 96), (33, 160), (1, 32), (130, 8), (5, 3)]  # out, in


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twin(linear, layer=None, dtype=torch.float32):
    return FastLinear(linear, layer, dtype)


def within(found, x, W, bias=None):
    """|found - x W^T - b| <= (in + 2) u |x| |W|^T + u' |result|: the bound of any order of sums."""
    x, W = x.double(), W.double()
    exact = x @ W.t() + (0 if bias is None else bias.double())
    size = x.abs() @ W.abs().t() + (0 if bias is None else bias.double().abs())
    allowed = (W.shape[1] + 2) * UNIT[torch.float32] * size + UNIT[found.dtype] * exact.abs()
    assert found.isfinite().all()
    return bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize(("dtype", "M"), EVERY)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dense_product_within_the_bound_of_float64(shape, dtype, M):
    linear = nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False)
    x = drawn(M, shape[1]).to(dtype)
    found = twin(linear, dtype=dtype)(x)
    assert found.dtype == dtype
    assert within(found, x, linear.weight, linear.bias)
    assert not within(found + 0.1 * found.abs().max(), x, linear.weight, linear.bias)


@pytest.mark.parametrize(("dtype", "M"), EVERY)
@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "fp4-dq"])
@pytest.mark.parametrize(("shape", "block"), [((6, 96), 32), ((9, 64), 64), ((64, 128), 1024)])
def test_a_four_bit_product_within_the_bound_of_float64(shape, block, format, dtype, M):
    q = lorax.quantize(drawn(*shape).to(dtype), format, block_size=block)
    x = drawn(M, shape[1], seed=1).to(dtype)
    found = twin(QuantizedLinear(q), dtype=dtype)(x)
    assert within(found, x, q.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("rank", [1, 4, 6, 33])
def test_the_low_rank_path_within_the_bound_of_float64(rank, dtype):
    layer = LoRALinear(nn.Linear(64, 33).to(dtype).requires_grad_(False), rank, 0.5, lora_bias=True)
    for parameter in layer.tensors().values():
        parameter.data = drawn(*parameter.shape, seed=2)
    x = drawn(3, 64).to(dtype)
    found = twin(layer.base_layer, layer, dtype)(x)
    A, B = layer.factors(dtype)  # the factors as the layer itself takes them
    W = layer.base_layer.weight.double() + 0.5 * B.double() @ A.double()
    exact = x.double() @ W.t() + layer.base_layer.bias.double() + 0.5 * layer.lora_B_bias.double()
    theirs = (layer.adapted(x).double() - exact).abs().max()  # PyTorch's, in the same dtype
    assert (found.double() - exact).abs().max() <= theirs + UNIT[dtype] * exact.abs().max()
    assert (found.double() - exact).abs().max() < 0.1 * 0.5 * (B.double() @ A.double()).abs().max()


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("kind", ["dense", "nf4-dq"])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_row_among_others_has_the_bits_that_it_has_alone(rank, kind, dtype):
    base = nn.Linear(96, 50).to(dtype).requires_grad_(False)
    if kind != "dense":
        base = QuantizedLinear(lorax.quantize(base.weight, kind), base.bias)
    layer = LoRALinear(base, rank, 2.0) if rank else None
    for parameter in layer.tensors().values() if rank else ():
        parameter.data = drawn(*parameter.shape)
    fast, x = twin(base, layer, dtype), drawn(16, 96).to(dtype)
    alone = torch.cat([fast(row) for row in x.split(1)])
    for M in range(2, 17):
        assert torch.equal(fast(x[:M]), alone[:M])


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_threads_do_not_change_the_bits(kind):
    base = nn.Linear(96, 51).requires_grad_(False)
    layer = LoRALinear(base, 5, 2.0)
    if kind != "dense":
        layer.base_layer = QuantizedLinear(lorax.quantize(base.weight, kind), base.bias)
    for parameter in layer.tensors().values():
        parameter.data = drawn(*parameter.shape)
    fast, x = twin(layer.base_layer, layer), drawn(3, 96)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fast(x)
        torch.set_num_threads(3)
        assert torch.equal(fast(x), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("format", ["nf4", "fp4", "nf4-dq"])
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_what_is_decoded_is_what_dequantize_gives(block, format, dtype):
    weight = drawn(40, 96) * torch.logspace(-8, 8, 40)[:, None]
    q = lorax.quantize(weight, format, block_size=block)
    assert torch.equal(twin(QuantizedLinear(q))._decoded(dtype), q.dequantize(dtype))


def test_what_is_not_a_number_stays_none():
    q = lorax.quantize(torch.full((4, 32), torch.nan), "nf4", nonfinite="allow")
    fast = twin(QuantizedLinear(q))
    assert fast._decoded(torch.bfloat16).isnan().all()
    assert fast(torch.ones(1, 32)).isnan().all()


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("many", [17, 40])
def test_many_rows_are_computed_as_the_module_does(many, dtype):
    q = QuantizedLinear(lorax.quantize(drawn(48, 64), "nf4"))
    x = drawn(2, many, 64).to(dtype)
    found = twin(q, dtype=dtype)(x)
    assert found.shape == (2, many, 48)
    exact = x.double() @ q.quantized.dequantize(torch.float32).double().t()
    theirs = (q(x).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= theirs + UNIT[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("kind", [RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("width", [8, 20, 576])
def test_a_norm_within_the_bound_of_float64(width, kind, dtype):
    norm = kind(width, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.add_(drawn(width).to(dtype))
    x = (3 * drawn(2, 5, width)).to(dtype)
    found, wide = FastNorm(norm)(x), x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    exact = exact * (norm.weight.double() + (kind is GemmaRMSNorm))
    roundings = (width / 2 + 8) * UNIT[torch.float32] + 2.01 * UNIT[dtype]  # a Llama's rounds twice
    assert ((found.double() - exact).abs() <= roundings * exact.abs()).all()
    assert (found.float() - norm(x).float()).abs().max() <= 2 * roundings * exact.abs().max()


class Sized:
    """What a cache asks of a model."""

    def __init__(self, dtype, kv_heads, width):
        self.config = type("Config", (), {"sizes": lorax_sizes(kv_heads, width)})
        norm = RMSNorm(4, 1e-5).to(dtype)
        self.body = type("Body", (), {"prefix_length": 0, "get_submodule": lambda s, n: norm})()
        self.norm_name = "norm"


def lorax_sizes(kv_heads, width):
    from lorax.models.config import Sizes

    return Sizes(width=4, layers=2, heads=2 * kv_heads, kv_heads=kv_heads, head_dim=width)


HOWS = [{}, {"window": 1}, {"window": 4}, {"scale": 0.3}, {"cap": 1.5}, {"window": 3, "cap": 0.7}]


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize(("kv_heads", "width"), [(1, 8), (3, 20), (2, 64)])
def test_attention_of_rows_against_its_slow_twin(kv_heads, width, how, dtype):
    caches = [RowsCache(Sized(dtype, kv_heads, width), 4, 12) for _ in range(2)]
    for cache in caches:
        cache.all.keys.copy_(drawn(*cache.all.keys.shape))
        cache.all.values.copy_(drawn(*cache.all.values.shape, seed=1))
        cache.lengths = [5, 0, 11, 2]
    query = drawn(3, 2 * kv_heads, 1, width, seed=2).to(dtype)
    key, value = (drawn(3, kv_heads, 1, width, seed=s).to(dtype) for s in (3, 4))
    found = []
    for cache, attend in zip(caches, (attend_native, attend_plain), strict=True):
        step = cache.step([2, 0, 1])
        given = (cache.all.keys[1], cache.all.values[1], query, key, value)
        found.append(attend(step, *given, **how).float())
    for name in ("keys", "values"):
        assert torch.equal(*(getattr(cache.all, name) for cache in caches))
    # Shares sum to one, so the values bound the result; bfloat16 rounds between steps over there.
    assert (found[0] - found[1]).abs().max() <= 16 * UNIT[dtype] * found[1].abs().max()


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("turning", [4, 20])
def test_attention_turns_queries_and_keys(turning, dtype):
    """Whole heads and the first values of each, by each row's own angles."""
    caches = [RowsCache(Sized(dtype, 3, 20), 4, 12) for _ in range(2)]
    for cache in caches:
        cache.all.keys.copy_(drawn(*cache.all.keys.shape))
        cache.all.values.copy_(drawn(*cache.all.values.shape, seed=1))
        cache.lengths = [5, 0, 11, 2]
    query, key, value = (
        drawn(3, heads, 1, 20, seed=s).to(dtype) for heads, s in ((6, 2), (3, 3), (3, 4))
    )
    angles = drawn(3, 1, 1, turning // 2, seed=5).repeat(1, 1, 1, 2)
    rope = angles.cos().to(dtype), angles.sin().to(dtype)
    steps = [cache.step([2, 0, 1]) for cache in caches]
    layers = [(cache.all.keys[1], cache.all.values[1]) for cache in caches]
    found = attend_native(steps[0], *layers[0], query, key, value, rope=rope).float()
    turned = [rotate(x.float(), *(r.float() for r in rope)).to(dtype) for x in (query, key)]
    expected = attend_plain(steps[1], *layers[1], *turned, value).float()
    # It is the key that is rounded; the query stays as exact as it was.
    stored, wanted = (keys.float() for keys, _ in layers)
    assert (stored - wanted).abs().max() <= 2 * UNIT[dtype] * wanted.abs().max()
    assert (found - expected).abs().max() <= 16 * UNIT[dtype] * expected.abs().max()
    plain = attend_plain(steps[1], *layers[1], query, key, value).float()
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize("kind", ["dense", "nf4-dq"])
def test_linears_together_give_the_bits_of_each_alone(kind, M, dtype):
    fast = []
    for n, (out, rank) in enumerate([(33, 5), (8, 0), (18, 4)]):
        base = nn.Linear(64, out).to(dtype).requires_grad_(False)
        if kind != "dense":
            base = QuantizedLinear(lorax.quantize(base.weight, kind), base.bias)
        layer = LoRALinear(base, rank, 2.0) if rank else None
        for parameter in layer.tensors().values() if rank else ():
            parameter.data = drawn(*parameter.shape, seed=n)
        fast.append(twin(base, layer, dtype))
    x = drawn(M, 1, 64).to(dtype)
    for found, linear in zip(Together(fast)(x), fast, strict=True):
        assert torch.equal(found, linear(x))


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("M", [1, 5, 16, 17])
def test_gated_linears_against_float64(M, dtype):
    fast = [twin(nn.Linear(40, 21).to(dtype).requires_grad_(False), dtype=dtype) for _ in "gu"]
    x = drawn(M, 40).to(dtype)
    (found,) = Together(fast, gated=True)(x)
    gate, up = (linear.base.double()(x.double()) for linear in fast)
    exact = nn.functional.silu(gate) * up
    bound = (64 if dtype == torch.float32 else 4) * UNIT[dtype]  # 40 terms; two roundings
    assert (found.double() - exact).abs().max() <= bound * max(1, exact.abs().max())


def test_the_structures_are_as_long_as_c_has_them():
    for name, structure in (("product_bytes", native.Product), ("layer_bytes", native.Layer)):
        theirs = ctypes.c_int64.in_dll(native.library(), name)
        assert ctypes.sizeof(structure) == theirs.value


def test_a_compiler_that_fails_is_said_to_be_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for compiler in ("false", "/no/such/compiler"):
            native.library.cache_clear()
            monkeypatch.setenv("CC", compiler)
            assert native.library() is None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.library() is not None


def test_the_library_is_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is not None
        (kept,) = (tmp_path / "lorax").iterdir()
        assert kept.suffix == ".so"
        native.library.cache_clear()
        monkeypatch.setattr(native, "_run", lambda *command: pytest.fail("compiled again"))
        assert native.library() is not None
        native.library.cache_clear()
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nothing can be kept there
        assert native.library() is not None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
