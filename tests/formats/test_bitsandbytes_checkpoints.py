"""Quantized model directories, both ways, against the installed transformers and bitsandbytes.

Exact where exactness is defined: bytes, scales and dequantized weights are bit-equal. Logits are
compared in float32 against a dense model with the very same weights, so what is left is the order
of a few hundred additions of values around 1 (TINY). bitsandbytes' own forward is run in training
mode only: on CPUs with AVX512-BF16 its eval forward packs the weight anew, in place, and multiplies
in bfloat16. So bytes are compared before any forward.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes_files import (
    EVEN,
    FORMATS,
    KINDS,
    LAYER,
    RAGGED,
    TINY,
    assert_same_weights,
    densified,
    exact,
    logits,
    opened,
    plain,
    quantized,
    settings,
    theirs_from,
)
from golden.make_bitsandbytes import GOLDEN, HERE, decoded, make, quantized_linears
from oracles import tokens
from safetensors.torch import load_file, save_file
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

import lorax
from lorax import cli
from lorax.errors import FormatError, LoraxError, QuantizationError, UsageError
from lorax.formats import quantize_model as module_under_test
from lorax.formats.huggingface import open_model_files
from lorax.formats.quantize_model import quantize_model
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.models.replace import replace_module
from lorax.quant.int8 import Int8Tensor
from lorax.quant.linear import QuantizedLinear

pytestmark = pytest.mark.slow


def dense_reference(source, theirs):
    """transformers' plain model with the weights that bitsandbytes decodes."""
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in quantized_linears(theirs).items():
        target = reference.get_submodule(name)
        weight = decoded(module).float()
        conv = type(target).__name__ == "Conv1D"
        target.weight.data = (weight.t() if conv else weight).contiguous()
    return reference


# bitsandbytes -> lorax -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_as_it_is(kind, format, tmp_path):
    plain(tmp_path / "plain", kind)
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", settings(format))
    mine = lorax.load_model(tmp_path / "q")
    assert_same_weights(mine, theirs)
    assert {q.format for q in quantized(mine).values()} == {format}
    if format != "int8":  # rows are multiples of the block, so their own kernel is right as well
        for name, module in quantized_linears(theirs).items():
            own = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(quantized(mine)[name].dequantize(), own)
    ids = tokens()
    expected = logits(dense_reference(tmp_path / "plain", theirs), ids)
    found = logits(mine, ids)
    alone = logits(densified(mine), ids)
    assert (alone - expected).abs().max() <= TINY
    if format != "int8":  # LLM.int8's product also rounds the activations to 8 bits
        assert torch.equal(found, alone)  # the same products of the same bits
        assert (logits(exact(theirs), ids) - found).abs().max() <= TINY


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_no_multiple_of_the_block_in_16_bits(kind, format, dtype, tmp_path):
    plain(tmp_path / "plain", kind, RAGGED)
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", settings(format), dtype)
    mine = lorax.load_model(tmp_path / "q")
    assert_same_weights(mine, theirs)
    assert {q.dtype for q in quantized(mine).values()} == {dtype}
    for name, parameter in theirs.named_parameters():
        if not any(name == f"{path}.weight" for path in quantized(mine)):
            assert torch.equal(mine.get_parameter(name), parameter), name


@pytest.mark.parametrize("storage", ["uint8", "int8", "float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_dtype(kind, storage, tmp_path):
    plain(tmp_path / "plain", kind)
    config = settings("nf4-dq", bnb_4bit_quant_storage=storage)
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", config)
    stored = load_file(tmp_path / "q" / "model.safetensors")[f"{LAYER[kind]}.weight"]
    assert stored.dtype == getattr(torch, storage)
    assert_same_weights(lorax.load_model(tmp_path / "q"), theirs)


def test_the_old_layout_with_weights_in_one_row(tmp_path):
    plain(tmp_path / "plain", "gpt2")
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", settings("nf4"))
    change(tmp_path / "q", lambda t: {n: x.t() if x.shape[1:] == (1,) else x for n, x in t.items()})
    stored = load_file(tmp_path / "q" / "model.safetensors")[f"{LAYER['gpt2']}.weight"]
    assert stored.shape[0] == 1
    assert_same_weights(lorax.load_model(tmp_path / "q"), theirs)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_gpt2_weights_lie_turned_in_the_file(format, tmp_path):
    """What formats.md says: a Conv1D (in, out) is quantized as (out, in)."""
    plain(tmp_path / "plain", "gpt2")
    theirs_from(tmp_path / "plain", tmp_path / "q", settings(format))
    n = EVEN["gpt2"]["n_embd"]
    path = "transformer.h.0.attn.c_attn"
    assert load_file(tmp_path / "plain" / "model.safetensors")[f"{path}.weight"].shape == (n, 3 * n)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    if format == "int8":
        assert tensors[f"{path}.weight"].shape == (3 * n, n)
    else:
        state = tensors[f"{path}.weight.quant_state.bitsandbytes__nf4"]
        assert json.loads(bytes(state.tolist()))["shape"] == [3 * n, n]


@pytest.mark.parametrize(
    ("kind", "skip", "left"),
    [
        ("llama", ["lm_head", "up_proj"], "up_proj"),
        ("llama", ["lm_head", "model.layers.1"], "layers.1."),
        ("gpt2", ["lm_head", "c_fc"], "c_fc"),
        ("gpt2", ["lm_head", "attn.c_proj"], "attn.c_proj"),
        ("llama", [], None),
    ],
)
@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_linears_that_were_skipped_and_a_head_that_was_not(kind, skip, left, format, tmp_path):
    plain(tmp_path / "plain", kind)
    config = settings(format, llm_int8_skip_modules=skip)
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", config)
    mine = lorax.load_model(tmp_path / "q")
    assert_same_weights(mine, theirs)
    plain_linears = {n for n, m in mine.named_modules() if type(m) is torch.nn.Linear}
    assert ("lm_head" in plain_linears) == (left is not None)
    assert all(n == "lm_head" or left in n for n in plain_linears)
    ids = tokens()
    expected = logits(dense_reference(tmp_path / "plain", theirs), ids)
    lorax.save_model(mine, tmp_path / "again")
    again = opened(tmp_path / "again")
    assert_same_weights(mine, again)
    assert_same_weights(lorax.load_model(tmp_path / "again"), again)
    assert torch.equal(logits(lorax.load_model(tmp_path / "again"), ids), logits(mine, ids))
    assert (logits(densified(mine), ids) - expected).abs().max() <= TINY


def test_another_dtype_is_that_of_the_activations_and_the_weights_keep_their_bits(tmp_path):
    """As in bitsandbytes: the product's weight is code * scale in the activations' dtype."""
    plain(tmp_path / "plain", "llama")
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", settings("nf4-dq"), torch.bfloat16)
    mine = lorax.load_model(tmp_path / "q", "float32")
    assert_same_weights(mine, theirs)
    assert {q.dtype for q in quantized(mine).values()} == {torch.bfloat16}
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    for parameter in reopened.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    ids = tokens()
    assert (logits(exact(reopened), ids) - logits(mine, ids)).abs().max() <= TINY
    lorax.add_adapter(mine, lorax.LoRAConfig(r=2, init_lora_weights=False))
    adapted = logits(mine, ids)
    lorax.unload_adapter(mine, merge=True)
    assert mine.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert (logits(mine, ids) - adapted).norm() <= 1e-5 * adapted.norm()  # promise R13


def test_an_8_bit_weight_has_the_face_of_a_quantized_one(tmp_path):
    plain(tmp_path / "plain", "llama")
    theirs = theirs_from(tmp_path / "plain", tmp_path / "q", settings("int8"))
    mine = lorax.load_model(tmp_path / "q", "bfloat16")
    name = LAYER["llama"]
    q = quantized(mine)[name]
    assert isinstance(q, Int8Tensor)
    assert q.nbytes == q.codes.numel() + 4 * len(q.codes)
    assert torch.equal(q.dequantize(), decoded(quantized_linears(theirs)[name]).bfloat16())
    out = torch.empty(q.shape)
    assert q.dequantize(out=out) is out
    other = lorax.load_model(tmp_path / "q", "bfloat16")
    for linear in (m for m in other.modules() if isinstance(m, QuantizedLinear)):
        linear.quantized = Int8Tensor(
            torch.zeros_like(linear.quantized.codes), linear.quantized.SCB, torch.bfloat16
        )
    other.load_state_dict(mine.state_dict())
    assert torch.equal(logits(other, tokens()), logits(mine, tokens()))


# lorax -> bitsandbytes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS[:4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_opens_in_transformers(kind, format, dtype, tmp_path):
    plain(tmp_path / "plain", kind)
    mine = lorax.load_model(tmp_path / "plain", dtype, quantization=format)
    lorax.save_model(mine, tmp_path / "q")
    theirs = opened(tmp_path / "q")
    assert_same_weights(mine, theirs)
    again = lorax.load_model(tmp_path / "q")
    assert_same_weights(again, theirs)
    ids = tokens()
    assert torch.equal(logits(again, ids), logits(mine, ids))
    if dtype == "float32":
        assert (logits(exact(theirs), ids) - logits(mine, ids)).abs().max() <= TINY


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_config_and_names_are_those_of_transformers(kind, format, tmp_path):
    """Their checkpoint, read and written by lorax: the same tensors, the same quantization."""
    plain(tmp_path / "plain", kind, RAGGED)
    compute = {} if format == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16}
    config = settings(format, **compute)
    theirs_from(tmp_path / "plain", tmp_path / "theirs", config, torch.bfloat16)
    lorax.save_model(lorax.load_model(tmp_path / "theirs"), tmp_path / "mine")
    theirs, mine = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "mine"))
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    stated = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "mine")]
    assert stated[1]["quantization_config"] == stated[0]["quantization_config"]
    assert_same_weights(lorax.load_model(tmp_path / "mine"), opened(tmp_path / "mine"))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_keep_a_weight_and_its_scales_together(kind, tmp_path):
    plain(tmp_path / "plain", kind)
    mine = lorax.load_model(tmp_path / "plain", quantization="nf4-dq")
    lorax.save_model(mine, tmp_path / "q", max_shard_bytes=30_000)
    weight_map = json.loads((tmp_path / "q/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    for path in quantized(mine):
        homes = {file for name, file in weight_map.items() if name.startswith(f"{path}.weight")}
        assert len(homes) == 1, path
    assert_same_weights(lorax.load_model(tmp_path / "q"), opened(tmp_path / "q"))


def test_every_block_size_is_written_and_read(tmp_path):
    for block_size in (32, 128, 4096):
        source = plain(tmp_path / f"plain{block_size}", "llama")
        target = tmp_path / f"q{block_size}"
        quantize_model(source, target, "nf4-dq", block_size=block_size)
        mine = lorax.load_model(target)
        assert {q.block_size for q in quantized(mine).values()} == {block_size}
        assert_same_weights(mine, opened(target))


def test_an_adapter_on_a_checkpoint_trains_and_the_base_stays(tmp_path):
    plain(tmp_path / "plain", "llama")
    theirs_from(tmp_path / "plain", tmp_path / "q", settings("nf4-dq"))
    model = lorax.load_model(tmp_path / "q")
    before = {n: q.packed.clone() for n, q in quantized(model).items()}
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules="all-linear"))
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    lorax.unload_adapter(model)
    assert all(torch.equal(q.packed, before[n]) for n, q in quantized(model).items())


# What is refused -------------------------------------------------------------------------------


def change(path, edit):
    """Rewrite a directory's tensors through `edit`."""
    file = path / "model.safetensors"
    tensors = {name: t.contiguous() for name, t in edit(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def with_state(tensors, key, **changes):
    state = json.loads(bytes(tensors[key].tolist()))
    text = json.dumps({**state, **changes}).encode()
    return {**tensors, key: torch.tensor(list(text), dtype=torch.uint8)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Sound checkpoints by format, to be copied and damaged."""
    root = tmp_path_factory.mktemp("stored")
    for kind in KINDS:
        plain(root / f"{kind}", kind)
        for format in ("nf4-dq", "fp4", "int8"):
            theirs_from(root / kind, root / f"{kind}-{format}", settings(format))
    return root


P = LAYER["llama"]
DAMAGE = {
    "no absmax": ("nf4-dq", lambda t: without(t, f"{P}.weight.absmax"), "weight.absmax"),
    "no nested absmax": (
        "nf4-dq", lambda t: without(t, f"{P}.weight.nested_absmax"), "weight.nested_absmax"),
    "no code": ("fp4", lambda t: without(t, f"{P}.weight.quant_map"), "weight.quant_map"),
    "no state": (
        "fp4", lambda t: without(t, f"{P}.weight.quant_state.bitsandbytes__fp4"), "weight"),
    "no weight": ("nf4-dq", lambda t: without(t, f"{P}.weight"), "weight"),
    "no SCB": ("int8", lambda t: without(t, f"{P}.SCB"), "SCB"),
    "short weight": ("nf4-dq", lambda t: {**t, f"{P}.weight": t[f"{P}.weight"][:-1]}, "weight"),
    "short absmax": (
        "fp4", lambda t: {**t, f"{P}.weight.absmax": t[f"{P}.weight.absmax"][:-1]},
        "weight.absmax"),
    "short SCB": ("int8", lambda t: {**t, f"{P}.SCB": t[f"{P}.SCB"][1:]}, "SCB"),
    "absmax in another dtype": (
        "fp4", lambda t: {**t, f"{P}.weight.absmax": t[f"{P}.weight.absmax"].double()},
        "weight.absmax"),
    "NaN scale": ("fp4", lambda t: spoiled(t, f"{P}.weight.absmax", float("nan")), "weight.absmax"),
    "infinite nested scale": (
        "nf4-dq", lambda t: spoiled(t, f"{P}.weight.nested_absmax", float("inf")),
        "weight.nested_absmax"),
    "negative scale": ("fp4", lambda t: spoiled(t, f"{P}.weight.absmax", -1.0), "weight.absmax"),
    "NaN SCB": ("int8", lambda t: spoiled(t, f"{P}.SCB", float("nan")), "SCB"),
    "another code": (
        "nf4-dq", lambda t: spoiled(t, f"{P}.weight.quant_map", 0.5), "weight.quant_map"),
    "float 8-bit weight": (
        "int8", lambda t: {**t, f"{P}.weight": t[f"{P}.weight"].float()}, "weight"),
    "old GPU rows": (
        "int8", lambda t: {**t, f"{P}.weight_format": torch.tensor(2, dtype=torch.uint8)},
        "weight_format"),
    "8 bits among 4": (
        "nf4-dq", lambda t: {**t, f"{P}.SCB": torch.ones(3)}, "weight"),
    "nested without a state": (
        "fp4", lambda t: {**t, f"{P}.weight.nested_absmax": torch.ones(1)}, "weight.nested_absmax"),
    "two states": (
        "fp4", lambda t: {
            **t, f"{P}.weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)},
        "weight"),
    "a quantized norm": (
        "fp4", lambda t: {**t, "model.norm.weight.absmax": torch.ones(2)}, None),
    "a scale of no weight": ("fp4", lambda t: {**t, "model.extra.SCB": torch.ones(2)}, None),
    "an odd part": ("fp4", lambda t: {**t, f"{P}.weight.zero": torch.ones(2)}, "weight.zero"),
}  # fmt: skip
STATES = [
    {"blocksize": 0}, {"blocksize": 63}, {"blocksize": 8192}, {"blocksize": -64},
    {"blocksize": 1e400}, {"blocksize": "64x"}, {"shape": [7, 7]}, {"shape": [192]},
    {"shape": [128, 192]}, {"shape": [-1, 128]}, {"shape": [10**18, 10**18]}, {"shape": None},
    {"dtype": "float8"}, {"dtype": ["float32"]}, {"quant_type": "nf4"}, {"nested_offset": 1.0},
    {"nested_offset": 10**400, "nested_dtype": "float16"}, {"nested_offset": float("nan")},
]  # fmt: skip


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


def spoiled(tensors, name, value):
    tensor = tensors[name].clone()
    tensor.view(-1)[len(tensor) // 2] = value
    return {**tensors, name: tensor}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_and_names_the_tensor(case, stored, tmp_path):
    format, edit, part = DAMAGE[case]
    shutil.copytree(stored / f"llama-{format}", tmp_path / "q")
    change(tmp_path / "q", edit)
    with pytest.raises(LoraxError) as error:
        lorax.load_model(tmp_path / "q")
    assert isinstance(error.value, FormatError | QuantizationError)
    assert "\n" not in str(error.value)
    names = ("model.norm.weight", "model.extra") if part is None else (f"{P}.{part}",)
    assert any(name in str(error.value) for name in names), error.value


@pytest.mark.parametrize("changes", STATES, ids=str)
def test_a_state_that_does_not_fit_is_refused_and_names_the_tensor(changes, stored, tmp_path):
    shutil.copytree(stored / "llama-fp4", tmp_path / "q")
    key = f"{P}.weight.quant_state.bitsandbytes__fp4"
    change(tmp_path / "q", lambda t: with_state(t, key, **changes))
    with pytest.raises(LoraxError, match=P.replace(".", r"\.")):
        lorax.load_model(tmp_path / "q")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b'{"a": 1}', b"\xff\xfe"])
def test_a_state_that_is_no_json_is_refused_and_names_the_tensor(text, stored, tmp_path):
    shutil.copytree(stored / "llama-fp4", tmp_path / "q")
    key = f"{P}.weight.quant_state.bitsandbytes__fp4"
    change(tmp_path / "q", lambda t: {**t, key: torch.tensor(list(text), dtype=torch.uint8)})
    with pytest.raises(LoraxError, match=P.replace(".", r"\.")):
        lorax.load_model(tmp_path / "q")


def test_a_gpt2_weight_the_other_way_round_is_refused(stored, tmp_path):
    shutil.copytree(stored / "gpt2-fp4", tmp_path / "q")
    key = f"{LAYER['gpt2']}.weight.quant_state.bitsandbytes__fp4"
    change(tmp_path / "q", lambda t: with_state(t, key, shape=[64, 256]))
    with pytest.raises(FormatError, match=r"c_fc\.weight.*\(out, in\)"):
        lorax.load_model(tmp_path / "q")


@pytest.mark.parametrize("cut", [7, 1000, 0.5, 0.999])
def test_a_truncated_file_is_refused(cut, stored, tmp_path):
    shutil.copytree(stored / "llama-nf4-dq", tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: cut if cut > 1 else int(cut * len(data))])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        lorax.load_model(tmp_path / "q")


@pytest.mark.parametrize("golden", GOLDEN)
def test_flipped_bytes_are_errors_of_lorax_or_do_no_harm(golden, tmp_path):
    """Promise S5. The header, the states and what lies between them, 30 damaged copies of each."""
    shutil.copytree(HERE / golden, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    states = [i for i in range(header, len(data)) if data[i : i + 12] == b'{"quant_type']
    for turn in range(30):
        start = draw.choice([0, header, *states])
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            span = header if start == 0 else 160 if start in states else len(data) - header
            damaged[min(start + draw.randrange(span), len(data) - 1)] = draw.randrange(256)
        file.write_bytes(damaged if turn % 10 else damaged[: draw.randrange(len(data))])
        with contextlib.suppress(LoraxError):
            lorax.load_model(tmp_path / "q")


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "SCB", "weight_format"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.int64, torch.float16])
def test_parts_of_another_dtype_or_without_dimensions_are_refused(name, dtype, stored, tmp_path):
    format = "fp4" if name.startswith("weight") and name != "weight_format" else "int8"
    key = f"{P}.{name}"
    for shape in ((), (3,), (2, 2, 2)):
        shutil.copytree(stored / f"llama-{format}", tmp_path / "q", dirs_exist_ok=True)
        change(tmp_path / "q", lambda t, s=shape: {**t, key: torch.ones(s).to(dtype)})
        with pytest.raises(LoraxError, match=P.replace(".", r"\.")):
            lorax.load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq", "load_in_4bit": True}, "awq"),
        ({"bits": 4}, "None"),
        ({"quant_method": "bitsandbytes"}, "neither"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "both"),
        ("nf4", "must be an object"),
        (["nf4"], "must be an object"),
    ],
)
def test_other_methods_are_refused_by_name(found, word, stored, tmp_path):
    shutil.copytree(stored / "llama-fp4", tmp_path / "q")
    edit_config(tmp_path / "q", quantization_config=found)
    with pytest.raises(FormatError, match=word):
        lorax.load_model(tmp_path / "q")


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_config_and_tensors_that_disagree_are_refused(stored, tmp_path):
    shutil.copytree(stored / "llama-int8", tmp_path / "q")
    edit_config(tmp_path / "q", quantization_config={"load_in_4bit": True})
    with pytest.raises(QuantizationError, match=r"model\.layers.*8 bits"):
        lorax.load_model(tmp_path / "q")
    shutil.copytree(stored / "llama-fp4", tmp_path / "plain")
    edit_config(tmp_path / "plain", quantization_config=None)
    with pytest.raises(FormatError, match=r"absmax|quant_map"):
        lorax.load_model(tmp_path / "plain")


def test_a_quantized_head_that_config_ties_is_refused(tmp_path):
    plain(tmp_path / "plain", "llama")
    config = settings("nf4", llm_int8_skip_modules=[])
    theirs_from(tmp_path / "plain", tmp_path / "q", config)
    edit_config(tmp_path / "q", tie_word_embeddings=True)
    with pytest.raises(FormatError, match="lm_head"):
        lorax.load_model(tmp_path / "q")


def test_a_checkpoint_is_not_quantized_twice(stored, tmp_path):
    with pytest.raises(UsageError, match="already"):
        lorax.load_model(stored / "llama-fp4", quantization="nf4")
    with pytest.raises(UsageError, match="already"):
        quantize_model(stored / "llama-fp4", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_4_and_in_8_bits_is_not_written(stored, tmp_path):
    model = lorax.load_model(stored / "llama-fp4")
    other = lorax.load_model(stored / "llama-int8")
    replace_module(model, P, other.get_submodule(P))
    with pytest.raises(UsageError, match="mixes"):
        lorax.save_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# lorax quantize --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd):
    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorax", *map(str, arguments)])
        capfd.readouterr()  # transformers' progress bars
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capfd.readouterr()
        return code, found.out, found.err

    return run_command


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("kind", "more"), [("llama", {"tie_word_embeddings": True}), ("gpt2", {})])
def test_the_command_gives_what_load_and_save_give(kind, more, format, run, tmp_path):
    plain(tmp_path / "plain", kind, **more)
    write_tokenizer(byte_tokenizer(chat_template="{{ messages }}"), tmp_path / "plain")
    options = ["--format", format, "--dtype", "bfloat16"]
    options += [] if format == "int8" else ["--block-size", 64]
    code, out, err = run("quantize", tmp_path / "plain", tmp_path / "q", *options)
    assert (code, err) == (0, "")
    assert "before" in out
    assert "after" in out
    assert "of" in out.splitlines()[0]  # progress, in plain lines
    model = lorax.load_model(tmp_path / "plain", "bfloat16", quantization=format)
    lorax.save_model(model, tmp_path / "other")
    mine, other = (load_file(tmp_path / n / "model.safetensors") for n in ("q", "other"))
    assert set(mine) == set(other)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert_same_weights(lorax.load_model(tmp_path / "q"), opened(tmp_path / "q"))
    assert lorax.load_tokenizer(tmp_path / "q").chat_template == "{{ messages }}"
    before = json.loads((tmp_path / "plain" / "config.json").read_text())
    after = json.loads((tmp_path / "q" / "config.json").read_text())
    settings = after.pop("quantization_config")
    assert settings["load_in_8bit"] == (format == "int8")
    assert settings["bnb_4bit_quant_type"] == ("fp4" if format == "int8" else format[:3])
    assert after == {**before, "dtype": "bfloat16"}  # nothing else of the config is lost


def test_the_command_prints_json_and_writes_shards(run, tmp_path):
    plain(tmp_path / "plain", "gpt2")
    arguments = [tmp_path / "plain", tmp_path / "q", "--json", "--max-shard-bytes", 30_000]
    code, out, _ = run("quantize", *arguments)
    assert code == 0
    result = json.loads(out)
    files = list((tmp_path / "q").glob("*.safetensors"))
    assert result["bytes_after"] == sum(file.stat().st_size for file in files)
    assert result["bytes_before"] == (tmp_path / "plain/model.safetensors").stat().st_size
    assert result["formats"] == {"nf4-dq": 12}
    assert len(files) > 3
    assert_same_weights(lorax.load_model(tmp_path / "q"), opened(tmp_path / "q"))


@pytest.mark.slow
def test_the_command_takes_a_gguf(smollm2_gguf, smollm2_tokenizer, tmp_path):
    result = quantize_model(smollm2_gguf, tmp_path / "q", dtype="bfloat16")
    model = lorax.load_model(tmp_path / "q")
    assert result.formats == {"nf4-dq": 210}
    assert result.bits_per_weight == pytest.approx(4.127, abs=2e-3)
    # 106 million quantized values, and the embedding's 28 million in 16 bits.
    assert result.bytes_after == pytest.approx(106.2e6 * 4.127 / 8 + 28.3e6 * 2, rel=0.01)
    text = "The sea is"
    assert lorax.load_tokenizer(tmp_path / "q").encode(text) == smollm2_tokenizer.encode(text)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj"):
        dense = open_model_files(smollm2_gguf).read(f"{name}.weight").bfloat16()
        direct = lorax.quantize(dense, "nf4-dq")
        assert torch.equal(quantized(model)[name].packed, direct.packed)
        assert torch.equal(quantized(model)[name].dequantize(), direct.dequantize())


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--format", "nf3"], 2, "nf3"),
        (["--block-size", "65"], 2, "65"),
        (["--block-size", "0"], 2, "0"),
        (["--format", "int8", "--block-size", "64"], 2, "per-row scales"),
        (["--format", "int4-affine"], 2, "bitsandbytes' layout"),
        (["--dtype", "float8"], 2, "float8"),
        (["--max-shard-bytes", "0"], 2, "max-shard-bytes"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(arguments, code, word, run, tmp_path):
    plain(tmp_path / "plain", "llama")
    found, _, err = run("quantize", tmp_path / "plain", tmp_path / "q", *arguments)
    assert found == code
    assert word in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_an_output_that_is_taken_is_left_alone(run, tmp_path):
    plain(tmp_path / "plain", "llama")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").write_text("here")
    code, _, err = run("quantize", tmp_path / "plain", tmp_path / "q")
    assert (code, "not empty" in err) == (2, True)
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["mine"]


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(run, tmp_path):
    plain(tmp_path / "plain", "llama")
    change(tmp_path / "plain", lambda t: spoiled(t, f"{P}.weight", float("nan")))
    arguments = [tmp_path / "plain", tmp_path / "q", "--max-shard-bytes", 30_000]
    code, _, err = run("quantize", *arguments)
    assert code == 4
    assert f"{P}.weight" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


@pytest.mark.parametrize("when", ["shard", "tokenizer"])
def test_a_full_disk_leaves_nothing(when, monkeypatch, tmp_path):
    plain(tmp_path / "plain", "llama")
    real = lorax.formats.safetensors_files.write_file
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    if when == "shard":
        monkeypatch.setattr(lorax.formats.safetensors_files, "write_file", full)
    else:
        monkeypatch.setattr(module_under_test, "_bring_tokenizer", lambda *a: full() or full())
        calls.append(1)
        calls.append(1)
    with pytest.raises(lorax.errors.EnvironmentProblem, match="No space"):
        quantize_model(tmp_path / "plain", tmp_path / "q", max_shard_bytes=30_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_a_failed_save_leaves_nothing(stored, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lorax.formats.safetensors_files, "write_file", full)
    with pytest.raises(lorax.errors.EnvironmentProblem, match="No space"):
        lorax.save_model(lorax.load_model(stored / "llama-fp4"), tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import sys
from lorax.formats.quantize_model import quantize_model
from lorax.heap import give_memory_back
give_memory_back()                              # as `lorax quantize` does
source, warm, target = sys.argv[1:4]
quantize_model(warm, target + "-warm")          # imports, thread pools, the small model's memory
def peak():  # not ru_maxrss, which on Linux begins with what the parent had when it started us
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
quantize_model(source, target, max_shard_bytes=int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_that_of_a_shard(tmp_path):
    """273 MB in bfloat16 become 74 MB: in the memory of a shard, a tensor and a constant.

    Measured growth for shards of 8, 16, 40 and 80 MB: 32, 40, 65 and 97 MB.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
             "num_attention_heads": 8, "vocab_size": 1000}  # fmt: skip
    torch.manual_seed(0)
    config = {"model_type": "llama", **sizes, "dtype": "bfloat16"}
    big_model(tmp_path / "plain", config)
    plain(tmp_path / "warm", "llama")
    shard = 16_000_000
    command = [sys.executable, "-c", MEMORY]
    command += [str(tmp_path / name) for name in ("plain", "warm", "q")] + [str(shard)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown = int(done.stdout)
    shards = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(shards) >= 4
    largest = 4096 * 1024 * 2  # bytes of the largest tensor of the source
    constant = 20_000_000  # the quantizer's buffers
    assert shard / 2 < grown <= shard + 2 * largest + constant, f"{grown / 1e6:.1f} MB"


def big_model(path, config):
    """A Llama of the given sizes in several shards, its values random."""
    from lorax.formats.model_config import new_model, read_config

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    model = new_model(read_config(config, "test"))
    tensors = {n: torch.empty(t.shape, dtype=torch.bfloat16) for n, t in model.state_dict().items()}
    noise = torch.randn(4096 * 1024).bfloat16()
    for tensor in tensors.values():
        tensor.view(-1).copy_(noise[: tensor.numel()])
    lorax.formats.safetensors_files.write_checkpoint(tensors, path, 100_000_000)


# The golden files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_files_are_what_the_installed_libraries_write(name, tmp_path):
    make(name, tmp_path / name)
    for file in ("model.safetensors", "dequantized.safetensors"):
        fresh, kept = load_file(tmp_path / name / file), load_file(HERE / name / file)
        assert set(fresh) == set(kept)
        assert all(bytes_of(fresh[key]) == bytes_of(kept[key]) for key in kept)


def bytes_of(tensor):
    """As they are: four-bit codes under a floating dtype may be NaNs, which equal nothing."""
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
