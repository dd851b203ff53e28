"""lorax verify: what is right holds, each planted fault is named, the numbers are true."""

import importlib.util
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from oracles import gpt2, llama, peft_model
from safetensors.torch import load_file, save_file
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax import cli
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError, DataError, EnvironmentProblem, FormatError, UsageError
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.parity.compare import compare
from lorax.parity.difference import difference
from lorax.parity.load_peft import load_peft
from lorax.parity.report import Check, Report
from lorax.parity.rows import batch
from lorax.parity.sides import LoraxSide

# Rows that are multiples of the block: bitsandbytes' AVX-512 decoder is right for these only.
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64},
}
MAKE = {"llama": llama, "gpt2": gpt2}
KINDS = tuple(MAKE)
SQUARE = {"llama": "model.layers.1.self_attn.o_proj", "gpt2": "transformer.h.1.attn.c_proj"}
FIRST = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """For each kind a base, another base of the same shape, and an rsLoRA adapter on the first."""
    root = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    for kind, make in MAKE.items():
        base = make(vocab_size=261, **SIZES[kind])
        base.save_pretrained(root / kind / "base")
        make(vocab_size=261, **SIZES[kind]).save_pretrained(root / kind / "other")
        for name in ("base", "other"):
            write_tokenizer(byte_tokenizer(), root / kind / name)
        settings = {"target_modules": "all-linear", "r": RANK, "lora_alpha": ALPHA}
        theirs = peft_model(base, use_rslora=True, **settings)
        theirs.save_pretrained(root / kind / "adapter")
        edit_config(root / kind / "adapter", base_model_name_or_path=str(root / kind / "base"))
    return root


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load_mine(folder):
    model = lorax.load_model(folder / "base", "float32")
    lorax.load_adapter(model, folder / "adapter", trainable=True)
    return LoraxSide(model)


def compared(folder, plant=lambda mine, theirs: None, base="base"):
    """Both sides loaded, a fault planted in one, and a report."""
    mine = load_mine(folder)
    theirs, _ = load_peft(folder / "adapter", folder / base)
    with torch.no_grad():
        plant(mine, theirs)
    ids = batch(lorax.load_tokenizer(folder / "base"), mine.model, None, 48)
    checks = compare(mine, theirs, ids, lambda: load_mine(folder))
    return Report("a", "b", "peft", None, ids.numel(), checks=checks)


# What is right, holds --------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_holds(kind, quantization, place):
    report = lorax.verify(place / kind / "adapter", quantization=quantization)
    assert report.holds, report
    assert report.first_difference is None
    totals = {total.quantity: total for total in report.totals}
    linears = len(adapter_layers(load_mine(place / kind).model))
    assert totals["adapter tensor"].equal == totals["adapter tensor"].parts == 2 * linears
    assert totals["gradient"].parts == 2 * linears
    for quantity in ("effective weight", "scaling"):
        assert totals[quantity].parts == linears
    assert totals["output"].parts > linears
    assert totals["base"].equal == totals["base"].parts
    assert ("quantizer" in totals) == (quantization is not None)
    if quantization in ("nf4", "fp4"):
        assert totals["quantizer"].equal == totals["4-bit base"].equal == 2 * linears


def test_an_untrained_adapter_holds(place, tmp_path):
    """B is zero, so A's gradient is exactly zero on both sides."""
    model = lorax.load_model(place / "llama" / "base", "float32")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2))
    lorax.save_adapter(model, tmp_path)
    assert lorax.verify(tmp_path).holds


def test_a_4_bit_checkpoint_is_compared_as_it_is(place, tmp_path):
    model = lorax.load_model(place / "gpt2" / "base", "bfloat16", quantization="nf4-dq")
    lorax.save_model(model, tmp_path / "base", tokenizer=byte_tokenizer())
    report = lorax.verify(place / "gpt2" / "adapter", base=tmp_path / "base")
    assert report.holds, report
    totals = {total.quantity: total for total in report.totals}
    assert totals["4-bit base"].equal == totals["4-bit base"].parts == 4 * 12
    merged = totals["merged weight"].worst
    assert "loses" in merged.note  # PEFT's own loss in merging is told, and not held against it


# Planted faults --------------------------------------------------------------------------------


def peft_layer(theirs, path):
    return theirs.modules[path]


def one_bit(path):
    def plant(mine, theirs):
        weight = peft_layer(theirs, path).lora_A["default"].weight
        weight.view(torch.int32)[1, 2] ^= 1

    return plant


def wrong_alpha(path):
    def plant(mine, theirs):
        peft_layer(theirs, path).scaling["default"] *= 1 + 1e-6

    return plant


def rslora_dropped(path):
    def plant(mine, theirs):
        peft_layer(theirs, path).scaling["default"] = ALPHA / RANK

    return plant


def swapped(path):
    def plant(mine, theirs):
        A = peft_layer(theirs, path).lora_A["default"].weight
        B = peft_layer(theirs, path).lora_B["default"].weight
        A.data, B.data = B.t().clone(), A.t().clone()

    return plant


def transposed_base(path):
    def plant(mine, theirs):
        weight = peft_layer(theirs, path).get_base_layer().weight
        weight.data = weight.t().clone()

    return plant


FAULTS = {  # what is planted, the quantity that must be named, words of the reason
    "one bit": (one_bit, "adapter tensor", "1 of 256 values differs, by 1 bit; lorax has the file"),
    "alpha": (wrong_alpha, "scaling", "another lora_alpha"),
    "rslora": (rslora_dropped, "scaling", r"lorax has alpha / sqrt\(4\)"),
    "swapped": (swapped, "adapter tensor", "A and B of this layer are swapped, transposed; lorax"),
    "transposed": (transposed_base, "base", "transposed"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_fault_is_found_and_named(kind, fault, place):
    plant, quantity, words = FAULTS[fault]
    report = compared(place / kind, plant(SQUARE[kind]))
    assert not report.holds
    first = report.first_difference
    assert (first["module"], first["quantity"]) == (SQUARE[kind], quantity)
    assert re.search(words, first["note"])
    still = {
        c.module for c in report.checks if not c.holds and c.quantity not in ("output", "gradient")
    }
    assert still <= {SQUARE[kind], ""}  # no other module is blamed; what follows is downstream
    effective = [
        c for c in report.checks if (c.module, c.quantity) == (SQUARE[kind], "effective weight")
    ]
    if fault in ("rslora", "swapped"):
        assert effective[0].nearer.lorax < 1e-6 < effective[0].nearer.peft
        assert "nearer to float64: lorax" in effective[0].said


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_found_at_its_first_module(kind, place):
    report = compared(place / kind, base="other")
    first = report.first_difference
    assert (first["module"], first["quantity"]) == (FIRST[kind], "base")
    assert "another base" in first["note"]
    assert "lorax has the file's values" in first["note"]


def test_a_fault_of_lorax_is_said_to_be_lorax_s(place):
    path = SQUARE["llama"]

    def plant(mine, theirs):
        mine.layers[path].lora_B[3, 1] *= 1.5

    report = compared(place / "llama", plant)
    first = report.first_difference
    assert (first["module"], first["part"]) == (path, "lora_B.weight")
    assert "PEFT has the file's bytes" in first["note"]
    (effective,) = [
        c for c in report.checks if (c.module, c.quantity) == (path, "effective weight")
    ]
    assert effective.nearer.peft < 1e-6 < effective.nearer.lorax
    assert "nearer to float64: PEFT" in effective.said


def test_a_fault_in_a_norm_that_has_no_adapter_is_found(place):
    def plant(mine, theirs):
        theirs.modules["model.layers.2.input_layernorm"].weight[0] *= 1 + 2**-20

    first = compared(place / "llama", plant).first_difference
    assert (first["module"], first["quantity"]) == ("model.layers.2.input_layernorm", "base")
    assert "1 of its" in first["note"]


def test_a_fault_in_peft_s_forward_alone_is_found_by_the_output(place):
    def plant(mine, theirs):
        layer = theirs.modules[SQUARE["llama"]]
        layer.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-4))

    first = compared(place / "llama", plant).first_difference
    assert (first["module"], first["quantity"]) == (SQUARE["llama"], "output")


def test_a_fault_in_the_backward_pass_alone_is_found_by_the_gradient(place):
    def plant(mine, theirs):
        theirs.modules[SQUARE["llama"]].lora_B["default"].weight.register_hook(lambda g: g * 1.01)

    report = compared(place / "llama", plant)
    first = report.first_difference
    assert (first["module"], first["quantity"]) == (SQUARE["llama"], "gradient")
    assert first["part"] == "lora_B.weight"
    assert sum(not c.holds for c in report.checks) == 1


# Faults between two files ----------------------------------------------------------------------


@pytest.fixture
def twin(place, tmp_path):
    """A copy of the Llama's adapter, for a fault."""
    shutil.copytree(place / "llama" / "adapter", tmp_path / "twin")
    return tmp_path / "twin"


A_NAME = f"base_model.model.{SQUARE['llama']}.lora_A.weight"


def swap_in_file(tensors):
    B_NAME = A_NAME.replace("lora_A", "lora_B")
    A, B = tensors[A_NAME], tensors[B_NAME]
    tensors[A_NAME], tensors[B_NAME] = B.t().contiguous(), A.t().contiguous()


def flip_in_file(tensors):
    tensors[A_NAME].view(torch.int32)[0, 0] ^= 1 << 3


def test_a_reference_that_is_the_same_holds(place, twin):
    report = lorax.verify(place / "llama" / "adapter", reference=twin)
    assert report.holds
    assert report.reference == str(twin)


@pytest.mark.parametrize(
    ("fault", "module", "quantity"),
    [
        ({"lora_alpha": 7}, "model.layers.0.self_attn.q_proj", "scaling"),
        ({"use_rslora": False}, "model.layers.0.self_attn.q_proj", "scaling"),
        ({"alpha_pattern": {SQUARE["llama"]: 7}}, SQUARE["llama"], "scaling"),
        (flip_in_file, SQUARE["llama"], "adapter tensor"),
        (swap_in_file, SQUARE["llama"], "adapter tensor"),
        ("other base", "model.embed_tokens", "base"),
    ],
)
def test_a_reference_that_differs_is_found(fault, module, quantity, place, twin):
    if fault == "other base":
        edit_config(twin, base_model_name_or_path=str(place / "llama" / "other"))
    elif isinstance(fault, dict):
        edit_config(twin, **fault)
    else:
        edit_tensors(twin, fault)
    report = lorax.verify(place / "llama" / "adapter", reference=twin)
    first = report.first_difference
    assert (first["module"], first["quantity"]) == (module, quantity)
    assert first["note"]


def test_overlapping_patterns_in_another_order_are_explained(place, twin, tmp_path):
    patterns = {"o_proj": 3, SQUARE["llama"]: 12}
    shutil.copytree(twin, tmp_path / "mine")
    edit_config(tmp_path / "mine", alpha_pattern=patterns)
    edit_config(twin, alpha_pattern=dict(reversed(patterns.items())))
    first = lorax.verify(tmp_path / "mine", reference=twin).first_difference
    assert (first["module"], first["quantity"]) == (SQUARE["llama"], "scaling")
    assert "the first in the file's order counts" in first["note"]


def test_a_reference_without_a_module_is_found(place, tmp_path):
    base = lorax.load_model(place / "llama" / "base", "float32")
    lorax.add_adapter(base, lorax.LoRAConfig(r=RANK, target_modules=["q_proj"]))
    lorax.save_adapter(base, tmp_path)
    first = lorax.verify(place / "llama" / "adapter", reference=tmp_path).first_difference
    assert first["quantity"] == "adapter tensor"  # of q_proj: other values
    edit_config(tmp_path, base_model_name_or_path=str(place / "llama" / "base"))
    report = lorax.verify(tmp_path, reference=place / "llama" / "adapter")
    missing = [c for c in report.checks if "the other side has none" in c.note]
    assert "model.layers.0.self_attn.k_proj" in {c.module for c in missing}
    assert "PEFT has it" in missing[0].note


# What lorax refuses ----------------------------------------------------------------------------


def refused(folder, twin, edit):
    edit_tensors(twin, edit)
    report = lorax.verify(twin)
    assert not report.holds
    assert report.first_difference["quantity"] == "loading"
    assert "lorax" in report.refusals
    return report, " ".join(report.notes)


def test_unexpected_tensors_are_a_report_and_peft_s_silence_is_told(place, twin):
    extra = A_NAME.replace("o_proj", "x_proj")
    report, notes = refused(place, twin, lambda t: t.update({extra: torch.zeros(4, 64)}))
    assert "unexpected" in report.refusals["lorax"]
    assert report.first_difference["module"] == "model.layers.1.self_attn.x_proj"
    assert "PEFT loads it without a word; its logits are finite" in notes
    assert (
        f"PEFT ignores a file's tensors that it has no place for; lorax refuses the file: {extra}"
        in notes
    )


def test_values_that_are_not_finite_are_a_report(place, twin):
    report, notes = refused(place, twin, lambda t: t[A_NAME].fill_(math.nan))
    assert report.first_difference["module"] == SQUARE["llama"]
    assert report.first_difference["part"] == "lora_A.weight"
    assert "its logits are not finite" in notes
    assert "PEFT loads values that are not finite" in notes


def test_what_peft_refuses_too_is_a_report(place, twin):
    report, _ = refused(place, twin, lambda t: t.update({A_NAME: torch.zeros(5, 64)}))
    assert "size mismatch" in report.refusals["peft"]


def test_a_file_that_would_make_peft_import_a_module_is_not_given_to_it(place, twin):
    edit_config(twin, megatron_config={"a": 1}, megatron_core="this.is.not.imported")
    report = lorax.verify(twin)
    assert "megatron_config" in report.refusals["lorax"]
    assert "would import" in report.refusals["peft"]


def test_bitsandbytes_decoder_is_blamed_exactly_where_it_is_wrong(place, tmp_path):
    """Rows of 48 with blocks of 64: on CPUs with AVX-512 its decoder departs from code * scale."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = llama(vocab_size=261)
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(byte_tokenizer(), tmp_path / "base")
    peft_model(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    weight = base.model.layers[0].self_attn.q_proj.weight.detach()
    theirs = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    is_right = torch.equal(theirs, lorax.quantize(weight, "nf4").dequantize())
    report = lorax.verify(tmp_path / "adapter", base=tmp_path / "base", quantization="nf4")
    assert report.holds == is_right
    if not is_right:
        first = report.first_difference
        assert (first["module"], first["quantity"]) == ("model.layers.0.self_attn.q_proj", "base")
        assert "AVX-512" in first["note"]


# The numbers -----------------------------------------------------------------------------------


def test_the_numbers_are_plain_arithmetic_s():
    theirs = torch.randn(7, 9)
    mine = theirs.clone()
    mine[2, 3] = torch.nextafter(mine[2, 3], torch.tensor(9e9)) * 1.0
    mine[5, 1] += 0.25
    found = difference(mine, theirs)
    gap = (mine.double() - theirs.double()).numpy()
    assert not found.equal
    assert found.max == np.abs(gap).max()
    assert found.rms == pytest.approx(np.sqrt((gap**2).mean()), rel=1e-12)
    assert found.relative == pytest.approx(
        np.linalg.norm(gap) / np.linalg.norm(theirs.double().numpy()), rel=1e-12
    )


def test_ulps_count_the_floats_between():
    one = torch.tensor([1.0, -1.0, 0.0, 2.0**-149])
    for steps, other in (
        (1, [1 + 2**-23, -1.0, 0.0, 2.0**-149]),
        (3, [1.0, -1 - 3 * 2**-23, 0.0, 2.0**-149]),
        (2, [1.0, -1.0, 0.0, -(2.0**-149)]),  # across zero: -0 and 0 are one
        (0, [1.0, -1.0, -0.0, 2.0**-149]),
    ):
        found = difference(torch.tensor(other), one)
        assert found.ulps == steps
        assert not found.equal  # not even -0 is 0


def test_a_nan_on_one_side_is_an_infinite_difference():
    found = difference(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert found.relative == math.inf
    assert not Check("m", "output", "", found, 1e-5, "").holds
    nan = torch.tensor([math.nan])
    assert difference(nan, nan.clone()).equal


def test_a_report_s_numbers_are_the_tensors(place):
    """Logits and one gradient, computed here by hand, against what the report says of them."""
    path = SQUARE["llama"]

    def plant(mine, theirs):
        theirs.modules[path].scaling["default"] *= 2

    report = compared(place / "llama", plant)
    mine = load_mine(place / "llama")
    theirs, _ = load_peft(place / "llama" / "adapter", place / "llama" / "base")
    theirs.modules[path].scaling["default"] *= 2
    ids = batch(lorax.load_tokenizer(place / "llama" / "base"), mine.model, None, 48)
    logits = mine.model(ids), theirs.model(input_ids=ids).logits
    gap = (logits[0] - logits[1]).double()
    (found,) = [c.difference for c in report.checks if c.quantity == "logits"]
    assert found.max == pytest.approx(gap.abs().max().item())
    assert found.relative == pytest.approx((gap.norm() / logits[1].double().norm()).item())
    gradients = []
    for side, made in zip((mine, theirs), logits, strict=True):
        loss = torch.nn.functional.cross_entropy(made[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        gradients.append(next(p.grad for n, p in side.root.named_parameters()
                              if n.startswith(path) and "lora_B" in n).double())  # fmt: skip
    expected = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    (found,) = [
        c.difference
        for c in report.checks
        if (c.module, c.quantity, c.part) == (path, "gradient", "lora_B.weight")
    ]
    assert found.relative == pytest.approx(expected.item(), rel=1e-4)


def test_a_small_adapter_s_factor_is_not_lost_in_a_large_base(place):
    """The path is 4e-4 of the weight; 1 % of it is 4e-6 of the weight, and found."""
    path = SQUARE["llama"]

    def plant(mine, theirs):
        layer = theirs.modules[path]
        for weight in (mine.layers[path].lora_B, layer.lora_B["default"].weight):
            weight.mul_(1e-3)
        layer.get_delta_weight = lambda adapter: 1.01 * type(layer).get_delta_weight(layer, adapter)

    report = compared(place / "llama", plant)
    found = next(c for c in report.checks if (c.module, c.quantity) == (path, "effective weight"))
    assert found.difference.relative < 1e-5
    assert not found.holds
    assert "PEFT's path is 1.01 times lorax's" in found.note


# JSON, HTML, the command line, the name --------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd, place):
    def run_command(*arguments):
        monkeypatch.chdir(place / "llama")
        monkeypatch.setattr(sys, "argv", ["lorax", "verify", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capfd.readouterr()
        return code, found.out, found.err

    return run_command


def test_the_command_says_that_it_holds(run, tmp_path):
    code, out, err = run("adapter", "--html", tmp_path / "r.html", "--tokens", 40)
    assert (code, "Traceback" in err) == (0, False)
    assert "holds: 209 parts agree" in out
    assert (tmp_path / "r.html").is_file()


def test_json_has_its_keys_and_is_strict(run, twin):
    code, out, _ = run("adapter", "--json")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0
    assert found["holds"] is True
    assert found["first_difference"] is None
    assert set(found) == {
        "holds", "first_difference", "adapter", "base", "reference", "against", "quantization",
        "tokens", "refusals", "notes", "totals", "checks",
    }  # fmt: skip
    assert set(found["checks"][0]) == {
        "module", "quantity", "part", "holds", "equal", "max", "rms", "relative", "ulps", "bound",
        "note", "nearer",
    }  # fmt: skip
    assert len(found["checks"]) == sum(total["parts"] for total in found["totals"])
    edit_config(twin, use_rslora=False)
    code, out, _ = run("adapter", "--reference", twin, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["holds"] is False
    assert found["first_difference"]["module"] == "model.layers.0.self_attn.q_proj"
    assert found["first_difference"]["quantity"] == "scaling"
    edit_tensors(twin, lambda t: t[A_NAME].fill_(math.inf))
    code, out, _ = run(twin, "--json")
    assert code == 1
    assert json.loads(out)["refusals"]["lorax"]


def test_the_page_is_self_contained_and_says_what_differs(place, twin, tmp_path):
    edit_tensors(twin, flip_in_file)
    report = lorax.verify(place / "llama" / "adapter", reference=twin)
    report.write_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert page.count("data:image/png;base64,") == page.count("<img") == 1
    assert "does not hold: first at" in page
    assert SQUARE["llama"] in page
    assert "1 of 256 values differs, by 1 bit" in page
    for total in report.totals:
        assert f"<td>{total.quantity}</td>" in page
    lorax.verify(place / "llama" / "adapter").write_html(tmp_path / "report.html")
    assert "holds: 209 parts agree" in (tmp_path / "report.html").read_text()


def test_the_page_escapes_what_files_say(tmp_path):
    report = Report("<script>x</script>", "b", "peft", None, 1, refusals={"lorax": "<b>&"})
    report.write_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;b&gt;&amp;" in page
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        report.write_html(tmp_path / "no" / "report.html")


MISTAKES = [
    (2, "'unsloth' is unknown; expected peft", "adapter --against unsloth"),
    (2, "nf5", "adapter --quantization nf5"),
    (2, "expected nf4", "adapter --quantization int8"),
    (2, "expected at least 2", "adapter --tokens 1"),
    (2, "one-too-many", "adapter one-too-many"),
    (3, "cannot be read", "adapter --text no.txt"),
    (3, "no such directory", "nowhere"),
    (4, "no adapter_config.json", "base"),
    (4, "no adapter_config.json", "adapter --reference base"),
    (3, "./no: no such directory", "adapter --base ./no"),
]


@pytest.mark.parametrize(("code", "words", "command"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_one_line_and_an_exit_code(run, code, words, command):
    found, out, err = run(*command.split())
    assert found == code
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err


def test_a_damaged_file_is_an_error_of_files(run, twin):
    path = twin / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = run(twin)
    assert code == 4
    assert "adapter_model.safetensors" in err


@pytest.mark.parametrize("package", ["peft", "transformers", "bitsandbytes"])
def test_a_missing_package_is_an_error_of_the_environment(run, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    code, _, err = run("adapter", "--quantization", "nf4")
    assert code == 3
    assert f"pip install {package}" in err


def test_a_text_of_one_s_own(place, tmp_path):
    (tmp_path / "text.txt").write_text("x" * 9)
    report = lorax.verify(place / "llama" / "adapter", text=tmp_path / "text.txt")
    assert report.holds
    assert report.tokens == 9
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UsageError, match="1 tokens"):
        lorax.verify(place / "llama" / "adapter", text=tmp_path / "text.txt")
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read"):
        lorax.verify(place / "llama" / "adapter", text=tmp_path / "text.txt")


def test_a_tokenizer_of_another_model_is_an_error(place, tmp_path):
    base = llama()  # 97 tokens; the tokenizer has 261
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(byte_tokenizer(), tmp_path / "base")
    peft_model(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match="the model's embedding has 97 rows"):
        lorax.verify(tmp_path / "adapter", base=tmp_path / "base")


def test_an_adapter_that_names_no_base_asks_for_one(place, twin):
    edit_config(twin, base_model_name_or_path=None)
    with pytest.raises(UsageError, match="--base"):
        lorax.verify(twin)
    assert lorax.verify(twin, base=place / "llama" / "base").holds


def test_an_8_bit_base_is_refused_by_name(place, twin, tmp_path):
    model = lorax.load_model(place / "llama" / "base", quantization="int8")
    lorax.save_model(model, tmp_path / "base8", tokenizer=byte_tokenizer())
    with pytest.raises(UsageError, match="int8"):
        lorax.verify(twin, base=tmp_path / "base8")


def test_a_tuned_prompt_is_refused_by_name(twin):
    edit_config(twin, peft_type="PROMPT_TUNING")
    with pytest.raises(AdapterError, match="tuned prompt"):
        lorax.verify(twin)


def test_verify_leaves_the_adapter_s_files_alone(place):
    folder = place / "gpt2" / "adapter"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    lorax.verify(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_verify_is_a_plain_function():
    from lorax.parity.against_peft import verify

    assert lorax.verify is verify


# The real model --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_smollm2(quantization, smollm2_short, tmp_path):
    model = lorax.load_model(smollm2_short)
    config = lorax.LoRAConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lorax.add_adapter(model, config)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.mul_(0.05)
    lorax.save_adapter(model, tmp_path)
    report = lorax.verify(tmp_path, base=smollm2_short, quantization=quantization)
    assert report.holds, report
    worst = {total.quantity: total.worst.difference.relative for total in report.totals}
    assert worst["logits"] <= 1e-6
    assert worst["gradient"] <= 5e-6
    assert worst["base"] == worst["adapter tensor"] == 0
    if quantization:
        assert worst["quantizer"] == 0


def test_the_missing_file_error_is_a_format_error(tmp_path):
    with pytest.raises(FormatError):
        lorax.verify(tmp_path)
