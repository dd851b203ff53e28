"""lorax verify over every variant of the family: what is right holds, a planted bit is named.

Each variant is written by PEFT and by lorax, on a tiny Llama and a tiny GPT-2.
"""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from variants import Variant, by_lorax, by_peft, make_base

import lorax
from lorax import cli
from lorax.parity.compare import compare
from lorax.parity.load_peft import load_peft
from lorax.parity.report import Report
from lorax.parity.rows import batch
from lorax.parity.sides import LoraxSide

R = {"r": 4, "lora_alpha": 6}
Q = R | {"target_modules": ["q_proj", "down_proj"]}
C = R | {"target_modules": ["c_attn", "c_proj"]}
ADA = {"init_r": 4, "lora_alpha": 6, "total_step": 20}
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj" for n in (0, 1))
C0, C1 = (f"transformer.h.{n}.attn.c_attn" for n in (0, 1))
P0, NORM, WTE = "transformer.h.0.attn.c_proj", "model.layers.0.input_layernorm", "transformer.wte"
EMBED, ROWS = "model.embed_tokens", "token_adapter.trainable_tokens_delta"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def case(kind, settings, module, *own, tensors, merged=True, adalora=False, **changes):
    """A variant; where its own tensors lie and their names; how many tensors the adapter has."""
    variant = Variant(kind, settings, changes, adalora)
    return SimpleNamespace(variant=variant, module=module, own=own, tensors=tensors, merged=merged)


# What PEFT and lorax both load, and the quantities that each must be held in.
CASES = {
    "lora": case("llama", Q, Q0, A, B, tensors=8),
    "lora gpt2": case("gpt2", C, C0, A, B, tensors=12),
    "rslora": case("llama", Q | {"use_rslora": True}, Q0, A, B, tensors=8),
    "rslora gpt2": case("gpt2", C | {"use_rslora": True}, C0, A, B, tensors=12),
    "dora": case("llama", Q | {"use_dora": True}, Q0, MAGNITUDE, A, B, tensors=12),
    "dora gpt2": case("gpt2", C | {"use_dora": True}, C0, MAGNITUDE, A, B, tensors=18),
    "lora_bias": case(
        "llama", Q | {"lora_bias": True}, Q0, "lora_B.bias", A, B, tensors=12, merged=False
    ),
    "lora_bias, biases": case("llama", Q | {"lora_bias": True}, Q0, "lora_B.bias", tensors=12,
                              **BIASED),
    "lora_bias gpt2": case("gpt2", C | {"lora_bias": True}, C0, "lora_B.bias", A, B, tensors=18),
    "embedding": case("llama", R | {"target_modules": ["embed_tokens", "q_proj"]}, EMBED,
                      "lora_embedding_A", "lora_embedding_B", tensors=6),
    "embedding, tied": case("llama", R | {"target_modules": ["embed_tokens", "q_proj"]}, EMBED,
                            "lora_embedding_A", "lora_embedding_B", tensors=6, **TIED),
    "embeddings gpt2": case("gpt2", R | {"target_modules": ["wte", "wpe", "c_attn"]},
                            "transformer.wpe", "lora_embedding_A", "lora_embedding_B", tensors=8),
    "dora on an embedding": case(
        "llama", R | {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}, EMBED,
        MAGNITUDE, "lora_embedding_A", "lora_embedding_B", tensors=9
    ),
    "dora on an embedding gpt2": case(
        "gpt2", R | {"use_dora": True, "target_modules": ["wte", "c_attn"]}, WTE, MAGNITUDE,
        "lora_embedding_A", "lora_embedding_B", tensors=9
    ),
    "head": case("llama", R | {"target_modules": ["lm_head", "q_proj"]}, "lm_head", A, B,
                 tensors=6),
    "head, tied": case("llama", R | {"target_modules": ["lm_head", "q_proj"]}, "lm_head", A, B,
                       tensors=6, **TIED),
    "head gpt2": case("gpt2", R | {"target_modules": ["lm_head", "c_attn"]}, "lm_head", A, B,
                      tensors=6),
    "adalora": case("llama", ADA | {"target_modules": ["q_proj", "down_proj"]}, Q1,
                    "lora_E", "lora_A", "lora_B", tensors=12, adalora=True),
    "adalora gpt2": case("gpt2", ADA | {"target_modules": ["c_attn", "c_proj"]}, C1,
                         "lora_E", "lora_A", "lora_B", tensors=18, adalora=True),
    "adalora and a head": case("llama", ADA | {"modules_to_save": ["lm_head"]}, "lm_head",
                               "weight", tensors=13, adalora=True),
    "pissa": case("llama", Q | {"init_lora_weights": "pissa"}, Q0, A, B, tensors=8),
    "pissa gpt2": case("gpt2", C | {"init_lora_weights": "pissa"}, C0, A, B, tensors=12),
    "olora": case("llama", Q | {"init_lora_weights": "olora"}, Q0, A, B, tensors=8),
    "a saved head": case("llama", Q | {"modules_to_save": ["lm_head"]}, "lm_head", "weight",
                         tensors=9),
    "a saved head, tied": case("llama", Q | {"modules_to_save": ["lm_head"]}, "lm_head", "weight",
                               tensors=9, **TIED),
    "a saved head, kept tied": case(
        "llama", Q | {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "lm_head",
        "weight", tensors=10, **TIED
    ),
    "a saved embedding": case("llama", Q | {"modules_to_save": ["embed_tokens"]}, EMBED, "weight",
                              tensors=9),
    "saved norms": case("llama", Q | {"modules_to_save": ["norm"]}, NORM, "weight", tensors=13),
    "saved mlps": case(
        "llama", R | {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        "model.layers.0.mlp.up_proj", "weight", tensors=10
    ),
    "saved Conv1Ds": case(
        "gpt2", R | {"target_modules": ["c_attn"], "modules_to_save": ["c_proj", "ln_f"]}, P0,
        "weight", "bias", tensors=14
    ),
    "a saved head gpt2": case(
        "gpt2", R | {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, "lm_head",
        "weight", tensors=5
    ),
    "rows": case("llama", Q | {"trainable_token_indices": [73, 1, 80]}, EMBED, ROWS, tensors=9),
    "rows, tied": case("llama", Q | {"trainable_token_indices": [73, 1, 80]}, EMBED, ROWS,
                       tensors=9, **TIED),
    "rows of both, tied": case(
        "llama", Q | {"trainable_token_indices": {"embed_tokens": [73, 70], "lm_head": [3]}},
        "lm_head", ROWS, tensors=10, **TIED
    ),
    "rows gpt2": case("gpt2", C | {"trainable_token_indices": {"wte": [73], "wpe": [0, 3]}}, WTE,
                      ROWS, tensors=14),
    "biases of adapted layers": case("llama", Q | {"bias": "lora_only"}, Q0, "base_layer.bias",
                                     tensors=12, **BIASED),
    "biases of adapted layers gpt2": case("gpt2", C | {"bias": "lora_only"}, C0,
                                          "base_layer.bias", tensors=18),
    "all biases": case("llama", Q | {"bias": "all"}, "model.layers.1.self_attn.o_proj", "bias",
                       merged=False, tensors=22, **BIASED),
    "all biases gpt2": case("gpt2", C | {"bias": "all"}, "transformer.h.1.ln_2", "bias",
                            merged=False, tensors=25),
    "all biases and a norm gpt2": case(
        "gpt2", R | {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]},
        "transformer.ln_f", "bias", "weight", tensors=18
    ),
    "patterns": case(
        "llama", Q | {"rank_pattern": {"layers.0.self_attn.q_proj": 2},
                      "alpha_pattern": {"down_proj": 3}}, Q0, A, B, tensors=8
    ),
    "patterns gpt2": case(
        "gpt2", C | {"rank_pattern": {"h.0.attn.c_attn": 2}, "alpha_pattern": {"mlp.c_proj": 3}},
        C0, A, B, tensors=12
    ),
    "dora, biases and rows": case(
        "llama", Q | {"use_dora": True, "bias": "all", "trainable_token_indices": [73]}, Q0,
        MAGNITUDE, "base_layer.bias", A, B, tensors=27, **BIASED
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Gives a variant's base and its adapter as PEFT or lorax wrote it; each is made once."""
    root = tmp_path_factory.mktemp("variants")
    bases = {}

    def made(name, who):
        variant = CASES[name].variant
        key = f"{variant.kind}-{'-'.join(variant.changes)}"
        if key not in bases:
            torch.manual_seed(0)
            bases[key] = make_base(root / key, variant.kind, **variant.changes)
        folder = root / f"{name} by {who}"
        if not folder.exists():
            torch.manual_seed(0)
            if who == "peft":
                by_peft(bases[key], variant, folder)
            else:
                by_lorax(root / key, variant, folder)
        return root / key, folder

    return made


def load_mine(base, adapter):
    model = lorax.load_model(base, "float32")
    lorax.load_adapter(model, adapter, trainable=True)
    return LoraxSide(model)


def parts(checks, module):
    """{quantity: its parts} of one module."""
    found = {}
    for check in checks:
        if check.module == module:
            found.setdefault(check.quantity, []).append(check.part)
    return found


# What is right, holds --------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["peft", "lorax"])
@pytest.mark.parametrize("name", CASES)
def test_a_variant_holds(name, who, place):
    base, adapter = place(name, who)
    expected = CASES[name]
    report = lorax.verify(adapter, base, tokens=48)
    assert report.holds, report
    totals = {total.quantity: total for total in report.totals}
    assert totals["adapter tensor"].equal == totals["adapter tensor"].parts == expected.tensors
    empty = sum(not t.numel() for t in load_file(adapter / "adapter_model.safetensors").values())
    assert totals["gradient"].parts == expected.tensors - empty  # a rank 0 has no gradient
    found = parts(report.checks, expected.module)
    assert set(expected.own) <= set(found["adapter tensor"])
    assert set(expected.own) <= set(found["gradient"])
    assert found["base"][0] == "weight"
    assert "" in found["output"]
    adapts = any("lora" in own for own in expected.own) or ROWS in expected.own
    assert ("effective weight" in found) == (adapts or "base_layer.bias" in expected.own)
    assert ("merged weight" in found) == expected.merged
    if name.startswith("lora_bias") and expected.merged:
        assert found["merged weight"] == ["weight", "bias"]


def test_that_peft_cannot_merge_is_told(place):
    """A Llama's Linears have no bias, which lora_bias would need; the weight is compared."""
    base, adapter = place("lora_bias", "lorax")
    report = lorax.verify(adapter, base, tokens=48)
    assert f"PEFT does not merge {Q0}: Impossible to merge" in " ".join(report.notes)
    assert "(and so for 3 more)" in " ".join(report.notes)


def test_adalora_has_a_layer_without_ranks_and_some_are_pruned(place):
    for who in ("peft", "lorax"):
        _, adapter = place("adalora", who)
        tensors = load_file(adapter / "adapter_model.safetensors")
        ranks = [len(t) for n, t in tensors.items() if n.endswith("lora_E")]
        assert min(ranks) == 0 < max(ranks)


# Planted faults --------------------------------------------------------------------------------


def flip(tensor):
    """The last bit of one value."""
    tensor.detach().view(torch.int32).flatten()[-1] ^= 1


@pytest.mark.parametrize("name", CASES)
def test_one_bit_of_a_variant_s_own_tensor_is_found_and_named(name, place):
    base, adapter = place(name, "lorax")
    module, part = CASES[name].module, CASES[name].own[0]
    mine = load_mine(base, adapter)
    theirs, _ = load_peft(adapter, base)
    flip(theirs.tensors()[f"{module}.{part}"])
    ids = batch(lorax.load_tokenizer(base), mine.model, None, 48)
    checks = compare(mine, theirs, ids, lambda: load_mine(base, adapter))
    report = Report("a", "b", "peft", None, ids.numel(), checks=checks)
    first = report.first_difference
    if name == "a saved head, kept tied":  # one copy in two places, and this is the first
        module = EMBED
    assert (first["module"], first["quantity"], first["part"]) == (module, "adapter tensor", part)
    assert "1 of" in first["note"]
    assert "differs, by 1 bit; lorax has the file's bytes" in first["note"]


@pytest.mark.parametrize(
    "name", ["a saved head", "saved mlps", "saved Conv1Ds", "all biases and a norm gpt2"]
)
def test_a_fault_in_the_base_below_what_is_saved_is_the_base_s(name, place):
    base, adapter = place(name, "lorax")
    theirs, _ = load_peft(adapter, base)
    module = CASES[name].module
    assert module in theirs.modules
    flip(theirs.originals[module].weight)
    checks = compare(load_mine(base, adapter), theirs, torch.arange(60, 80)[None])
    wrong = [(c.module, c.quantity, c.part) for c in checks if not c.holds]
    assert wrong == [(module, "base", "weight")]  # nothing computes with it


@pytest.mark.parametrize("name", ["a saved head, tied", "saved Conv1Ds", "all biases", "rows"])
def test_a_fault_in_the_backward_pass_is_found_by_that_gradient(name, place):
    base, adapter = place(name, "lorax")
    theirs, _ = load_peft(adapter, base)
    expected = CASES[name]
    full = f"{expected.module}.{expected.own[0]}"
    where = theirs.tensors()[full].data_ptr()
    (parameter,) = [p for p in theirs.root.parameters()
                    if p.requires_grad and p.data_ptr() == where]  # fmt: skip
    parameter.register_hook(lambda gradient: gradient * 1.01)
    checks = compare(load_mine(base, adapter), theirs, torch.arange(60, 80)[None])
    wrong = [(c.module, c.quantity, c.part) for c in checks if not c.holds]
    assert wrong == [(expected.module, "gradient", expected.own[0])]


def test_another_start_of_pissa_is_found_in_the_base(place):
    """The residual is PEFT's base: one of its values moved by 1 % of the whole's size."""
    base, adapter = place("pissa", "lorax")
    theirs, _ = load_peft(adapter, base)
    weight = theirs.base_of(theirs.modules[Q0]).weight
    with torch.no_grad():
        weight[1, 2] += 0.01 * weight.norm()
    checks = compare(load_mine(base, adapter), theirs, torch.arange(60, 80)[None])
    first = next(c for c in checks if not c.holds)
    assert (first.module, first.quantity, first.part) == (Q0, "base", "weight")


def test_float64_decides_by_the_file_s_tensors_in_every_variant(place):
    """exact_weight is computed in float64, not float32's result with more digits."""
    for name in ("lora", "dora", "embedding", "adalora", "pissa"):
        base, adapter = place(name, "lorax")
        module = Q1 if name == "adalora" else CASES[name].module
        side = load_mine(base, adapter)
        exact = side.exact_weight(module)
        rounded = side.effective_weight(module)
        assert exact.dtype == torch.float64
        assert 0 < (exact - rounded).norm() < 1e-6 * exact.norm()
        assert not torch.equal(exact.float().double(), exact)


# What one of the two refuses -------------------------------------------------------------------


def test_loftq_on_a_cpu_is_peft_s_refusal_with_its_reason(run, tmp_path):
    torch.manual_seed(0)
    make_base(tmp_path / "base", "llama")
    by_lorax(tmp_path / "base", Variant("llama", Q | LOFTQ), tmp_path / "adapter")
    code, out, _ = run(tmp_path / "adapter")
    assert code == 1
    assert "does not hold" in out
    assert "PEFT does not load it: " in out
    assert "scipy" in out or "CUDA" in out


@pytest.mark.parametrize("who", ["peft", "lorax"])
def test_loftq_holds_where_peft_can_load_it(who, tmp_path, loftq_on_a_cpu):
    torch.manual_seed(0)
    base = make_base(tmp_path / "base", "llama")
    variant = Variant("llama", Q | LOFTQ)
    if who == "peft":
        by_peft(base, variant, tmp_path / "adapter")
    else:
        by_lorax(tmp_path / "base", variant, tmp_path / "adapter")
    report = lorax.verify(tmp_path / "adapter", tmp_path / "base", tokens=48)
    assert report.holds, report
    found = parts(report.checks, Q0)
    assert found["adapter tensor"] == found["gradient"][::-1] == [A, B]
    assert "base" in found  # PEFT's is Q, lorax's too
    assert "effective weight" in found


@pytest.mark.parametrize(
    ("kind", "how", "words"),
    [
        ("llama", "pissa_niter_4", "draws its start at random"),
        ("gpt2", "olora", "decomposes GPT-2's weights transposed"),
    ],
)
def test_a_start_that_the_file_does_not_determine_is_refused_with_its_reason(
    kind, how, words, run, tmp_path
):
    torch.manual_seed(0)
    base = make_base(tmp_path / "base", kind)
    settings = (Q if kind == "llama" else C) | {"init_lora_weights": how}
    by_peft(base, Variant(kind, settings), tmp_path / "theirs")
    code, out, _ = run(tmp_path / "theirs", "--base", tmp_path / "base")
    assert code == 1
    assert words in out
    by_lorax(tmp_path / "base", Variant(kind, settings), tmp_path / "mine")  # as a plain LoRA
    code, out, _ = run(tmp_path / "mine")
    assert code == 0, out


# The fingerprint -------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capfd):
    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorax", "verify", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capfd.readouterr()
        assert "Traceback" not in found.out + found.err
        return code, found.out, found.err

    return run_command


@pytest.fixture
def twin(place, tmp_path):
    """(base, a copy of the lorax-saved adapter for an edit)"""
    base, adapter = place("lora", "lorax")
    shutil.copytree(adapter, tmp_path / "twin")
    return base, tmp_path / "twin"


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory, edit):
    """Change the tensors and leave the metadata as it is."""
    path = directory / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def swap_layers(tensors):
    one, two = (f"base_model.model.{module}.{A}" for module in (Q0, Q1))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def drop_one(tensors):
    del tensors[f"base_model.model.{Q1}.{A}"]


# what is done to it -> the module and part that are named, and words of the fingerprint
EDITS = {
    "alpha": ({"lora_alpha": 7}, Q0, "", "lora_alpha is 7, was 6"),
    "rslora": ({"use_rslora": True}, Q0, "", "use_rslora is True, was False"),
    "one layer's alpha": ({"alpha_pattern": {Q1: 7}}, Q1, "", "alpha_pattern is"),
    "swapped layers": (swap_layers, Q0, A, f"changed: base_model.model.{Q0}.{A}, "),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_adapter_says_what_its_fingerprint_says(edit, twin, run):
    """PEFT loads it, and lorax agrees with PEFT on these files: only the fingerprint knows."""
    _base, adapter = twin
    change, module, part, words = EDITS[edit]
    if isinstance(change, dict):
        edit_config(adapter, **change)
    else:
        edit_tensors(adapter, change)
    code, out, _ = run(adapter, "--json", "--tokens", 48)
    assert code == 1
    found = json.loads(out)
    first = found["first_difference"]
    assert (first["quantity"], first["module"], first["part"]) == ("fingerprint", module, part)
    assert words in first["note"]
    assert found["refusals"] == {"fingerprint": first["note"]}
    assert len(found["checks"]) > 60
    assert all(check["holds"] for check in found["checks"])
    code, out, _ = run(adapter, "--tokens", 48)
    assert code == 1
    assert words in out
    assert "these files: all 72 parts agree between lorax and PEFT" in out
    assert re.search(rf"does not hold: first at {re.escape(module)}\S* \(fingerprint\)", out)


def test_an_edited_adapter_against_the_one_that_was_saved_names_the_module_too(twin, place, run):
    _base, adapter = twin
    edit_tensors(adapter, swap_layers)
    _, saved = place("lora", "lorax")
    code, out, _ = run(adapter, "--reference", saved, "--tokens", 48)
    assert code == 1
    assert "not those that were saved" in out
    assert f"these files: first at {Q0}.{A} (adapter tensor)" in out
    assert "why: " in out


def test_another_base_is_what_the_fingerprint_says_and_is_compared(twin, run, tmp_path):
    base, adapter = twin
    torch.manual_seed(1)
    make_base(tmp_path / "other", "llama")
    code, out, _ = run(adapter, "--base", tmp_path / "other", "--json", "--tokens", 48)
    assert code == 1
    found = json.loads(out)
    assert found["first_difference"]["quantity"] == "fingerprint"
    assert f"trained over {base}" in found["first_difference"]["note"]
    assert "but other values" in found["first_difference"]["note"]
    assert len(found["checks"]) > 60
    assert all(check["holds"] for check in found["checks"])


def test_another_base_on_peft_s_side_alone_names_the_module(twin, tmp_path, run):
    _base, adapter = twin
    torch.manual_seed(1)
    make_base(tmp_path / "other", "llama")
    shutil.copytree(adapter, tmp_path / "reference")
    edit_config(tmp_path / "reference", base_model_name_or_path=str(tmp_path / "other"))
    code, out, _ = run(adapter, "--reference", tmp_path / "reference", "--json", "--tokens", 48)
    first = json.loads(out)["first_difference"]
    assert (code, first["module"], first["quantity"]) == (1, EMBED, "base")


def test_a_file_that_neither_loads_says_both_things(twin, run):
    _base, adapter = twin
    edit_tensors(adapter, drop_one)
    code, out, _ = run(adapter, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["checks"] == []
    assert "not those that were saved" in found["refusals"]["lorax"]
    assert "7 tensors, there were 8" in found["refusals"]["lorax"]
    assert "1 missing" in found["refusals"]["lorax"]


def test_an_older_fingerprint_without_digests_of_tensors_still_refuses(twin, run):
    _base, adapter = twin
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    mark = json.loads(metadata["lorax.fingerprint"])
    del mark["adapter"]["tensors"]
    tensors = load_file(path)
    save_file(tensors, path, metadata=metadata | {"lorax.fingerprint": json.dumps(mark)})
    assert run(adapter, "--tokens", 48)[0] == 0
    edit_tensors(adapter, swap_layers)
    code, out, _ = run(adapter, "--tokens", 48)
    assert code == 1
    assert "another SHA-256)" in out
