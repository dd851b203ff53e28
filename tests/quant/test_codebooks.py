"""The table of codebooks, and a researcher's own in every place that takes a format's name."""

import shutil
import subprocess
import sys

import kernel_testing
import pytest
import torch
from oracles import llama, tokens

import lorax
from lorax.backend import backend
from lorax.errors import QuantizationError, RecipeError, UsageError
from lorax.formats.quantize_model import quantize_model
from lorax.inspect.quantization import inspect_quantization
from lorax.merging.routes import Route
from lorax.quant import codebooks
from lorax.quant.blockwise import dequantize_blockwise
from lorax.quant.linear import QuantizedLinear
from lorax.training.recipe import Recipe

SYM4 = [(2 * code - 15) / 15 for code in range(16)]  # equal steps, no zero
SHUFFLED = SYM4[8:] + SYM4[:8]  # in another order, as FP4's
LEANING = [-0.25 + code / 12 for code in range(16)]  # has a zero, and does not reach -1
MINE = {"sym4": SYM4, "turned4": SHUFFLED, "leaning4": LEANING}
FORMATS = [name + second for name in MINE for second in ("", "-dq")]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The three codebooks, for one test at a time."""
    monkeypatch.setattr(codebooks, "CODEBOOKS", dict(codebooks.CODEBOOKS))
    for name, values in MINE.items():
        lorax.register_codebook(name, values, source="this test")


def nearest(weight, values, block_size=64):
    """What quantizing means, in float64 and by brute force: the nearest value times absmax."""
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block_size))
    blocks = blocks.view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True).double()
    code = torch.tensor(values, dtype=torch.float32).double()
    wanted = blocks.double() / absmax.clamp_min(1e-38)
    found = code[(wanted[..., None] - code).abs().argmin(-1)] * absmax
    return found.flatten()[: weight.numel()].view(weight.shape)


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("shape", [(24, 64), (7, 33), (1,), (0,), (5, 65)])
def test_values_are_the_nearest_for_any_size(name, shape):
    weight = torch.randn(shape)
    q = lorax.quantize(weight, name)
    torch.testing.assert_close(
        q.dequantize().double(), nearest(weight, MINE[name]), rtol=1e-6, atol=0
    )
    assert q.format == name


@pytest.mark.parametrize("format", FORMATS)
def test_the_fast_decoder_gives_the_plain_ones_bits(format):
    q = lorax.quantize(torch.randn(37, 65), format)
    code, plain = codebooks.four_bit(q.quant_type), torch.empty(37 * 65)
    dequantize_blockwise(q.codes(), q.scales(), code, 64, plain)
    assert torch.equal(q.dequantize().flatten(), plain)


@pytest.mark.parametrize("format", [*FORMATS, "nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_zero_blocks_come_back_as_zeros(format):
    """Also under double quantization, whose scales are not exactly zero: then they stay float32."""
    weight = torch.randn(8, 256)
    weight[2, 64:128] = 0
    weight[5] = 0
    back = lorax.quantize(weight, format).dequantize()
    assert torch.equal(back[2, 64:128], torch.zeros(64))
    assert torch.equal(back[5], torch.zeros(256))
    assert torch.equal(lorax.quantize(torch.zeros(3, 33), format).dequantize(), torch.zeros(3, 33))


def test_double_quantization_holds_without_a_zero():
    q = lorax.quantize(torch.randn(64, 256), "sym4-dq")
    assert q.format == "sym4-dq"
    assert q.absmax.dtype == torch.uint8


@pytest.mark.parametrize("format", [*FORMATS, "nf4", "fp4-dq"])
@pytest.mark.parametrize("shape", [(8, 64), (3, 43)])
def test_triton_quantizes_and_decodes_with_the_same_bits(format, shape, monkeypatch):
    from lorax.kernels import quantize as kernels

    calls = []
    real = kernels.quantize_4bit
    monkeypatch.setattr(kernels, "quantize_4bit", lambda *a: calls.append(1) or real(*a))
    weight = torch.randn(shape, device=kernel_testing.DEVICE)
    found = []
    for name in ("pytorch", "triton"):
        with backend(name):
            q = lorax.quantize(weight, format)
            found.append([*q.tensors(), q.dequantize(torch.bfloat16)])
    assert calls == [1]
    assert len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@needs_compiler
def test_the_compiled_decoder_reads_the_table():
    for format in ("nf4", "sym4", "turned4-dq", "fp4"):
        q = lorax.quantize(torch.randn(6, 128).bfloat16(), format)
        expected = q.dequantize()
        with backend("compiled"):
            assert torch.equal(q.dequantize(), expected), format


def test_the_compiled_decoder_refuses_what_is_not_in_the_table(monkeypatch):
    q = lorax.quantize(torch.randn(6, 128).bfloat16(), "leaning4")
    monkeypatch.delitem(codebooks.CODEBOOKS, "leaning4")
    codebooks.four_bit.cache_clear()
    with (
        backend("compiled"),
        pytest.raises(QuantizationError, match=r"'leaning4' is unknown.*register"),
    ):
        q.dequantize()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sym4-dq", SYM4, "lower-case letters"),
        ("int4", SYM4, "lower-case letters"),
        ("Sym4", SYM4, "lower-case letters"),
        ("", SYM4, "lower-case letters"),
        ("short", SYM4[:15], "found 15"),
        ("wide", [2 * value for value in SYM4], r"16 values in \[-1, 1\]"),
        ("nan", [float("nan"), *SYM4[1:]], r"16 values in \[-1, 1\]"),
        ("huge", [1e300, *SYM4[1:]], r"16 values in \[-1, 1\]"),
        ("fine", [0.5 + code * 1e-4 for code in range(16)], "too fine"),
        ("nf4", SYM4, "is there with other values"),
        ("sym4", SHUFFLED, "is there with other values"),
    ],
)
def test_no_codebook(name, values, message):
    before = dict(codebooks.CODEBOOKS)
    with pytest.raises(QuantizationError, match=message):
        lorax.register_codebook(name, values)
    assert before == codebooks.CODEBOOKS


def test_the_same_again_changes_nothing_and_tensors_are_taken():
    before = dict(codebooks.CODEBOOKS)
    lorax.register_codebook("sym4", torch.tensor(SYM4))
    lorax.register_codebook("nf4", codebooks.NF4_VALUES)
    assert before == codebooks.CODEBOOKS


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("format", ["sym4", "sym4-dq"])
def test_a_model_trains_its_adapter_and_merges_over_it(base, format):
    model, ids = lorax.load_model(base, quantization=format), tokens()
    linears = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert linears
    assert {q.quant_type for q in linears} == {"sym4"}
    lorax.add_adapter(model, lorax.LoRAConfig(r=4, target_modules="all-linear"))
    optimizer = lorax.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(
            model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        adapted = model(ids)
        lorax.merge_adapter(model)
        torch.testing.assert_close(model(ids), adapted, rtol=1e-4, atol=1e-4)


def test_state_dict_goes_round(base):
    one, other = (lorax.load_model(base, quantization="sym4-dq") for _ in range(2))
    for module in other.modules():
        if isinstance(module, QuantizedLinear):
            module.quantized = lorax.quantize(torch.zeros(module.quantized.shape), "sym4-dq")
    state = one.state_dict()
    assert any(name.endswith("quant_state.lorax__sym4") for name in state)
    other.load_state_dict(state)
    assert torch.equal(one(tokens()), other(tokens()))


def test_a_state_whose_codebook_is_not_registered_says_how(monkeypatch):
    state = lorax.quantize(torch.randn(4, 64), "sym4").state_dict()
    changed = {**state, "weight.quant_map": state["weight.quant_map"].flip(0)}
    with pytest.raises(QuantizationError, match="not the table"):
        lorax.QuantizedTensor.from_bitsandbytes(changed)
    monkeypatch.delitem(codebooks.CODEBOOKS, "sym4")
    with pytest.raises(QuantizationError, match=r"register_codebook\('sym4', values\) first"):
        lorax.QuantizedTensor.from_bitsandbytes(state)


def test_bitsandbytes_files_are_refused_by_name(base, tmp_path):
    q = lorax.quantize(torch.randn(4, 64), "sym4")
    with pytest.raises(QuantizationError, match="bitsandbytes has no format sym4"):
        q.to_bitsandbytes()
    model = lorax.load_model(base, quantization="sym4")
    with pytest.raises(UsageError, match=r"sym4, which.*load it with quantization='sym4'"):
        lorax.save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(UsageError, match="'sym4' cannot be written in bitsandbytes' layout"):
        quantize_model(base, tmp_path / "saved", format="sym4")


def test_routes_and_the_inspector_take_it(base):
    assert Route.parse("sym4-dq+r16", torch.float32).format == "sym4-dq"
    found = inspect_quantization(str(base), ("sym4", "nf4"), (64,), "auto")
    assert found is not None


def test_recipes_take_it():
    section = {"path": "base", "quantization": "sym4-dq"}
    given = {"model": section, "data": {"path": "rows.jsonl"}, "train": {"output_dir": "run"}}
    assert Recipe.from_dict(given).model.quantization == "sym4-dq"
    section["quantization"] = "sym5"
    with pytest.raises(RecipeError, match=r"input should be 'nf4', .*'sym4-dq'.*'int4-affine'"):
        Recipe.from_dict(given)


def test_the_table_needs_no_torch():
    code = (
        "import sys, lorax; lorax.register_codebook('mine', [c / 15 for c in range(16)]);"
        "from lorax.quant import names; print('mine-dq' in names.formats(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_no_import_circle_whichever_file_comes_first():
    """Each file in a fork of its own, of one process that has torch and nothing of lorax."""
    code = """
import importlib, os, sys, torch
for first in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(f"lorax.quant.{first}")
        os._exit(0)  # not reached where the import fails
    assert os.waitpid(child, 0)[1] == 0, first
"""
    first = ["tensor", "linear", "four_bit", "int8", "affine", "quantize"]
    subprocess.run([sys.executable, "-c", code, *first], check=True)


def test_a_tensor_is_read_in_a_fresh_process():
    code = (
        "import torch, lorax; from lorax.quant.affine import quantize;"
        "state = quantize(torch.ones(4, 64), 'int4-affine').state_dict();"
        "print(lorax.QuantizedTensor.from_bitsandbytes(state).format)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "int4-affine"
