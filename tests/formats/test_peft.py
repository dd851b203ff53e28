"""Adapters against the installed PEFT: files both ways, logits, gradients, which modules."""

import copy
import json

import pytest
import torch
from oracles import gpt2, llama, peft_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft_pairs import config_as_read
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError, FormatError

FLOAT32 = 1e-5

# What issue 2 covers, on both models.
LLAMA_CASES = {
    "default targets": {},
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 4},
    "alpha": {"target_modules": ["q_proj"], "lora_alpha": 3, "r": 5},
    "rank pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 2},
    },
    "alpha pattern": {"target_modules": ["q_proj"], "alpha_pattern": {r"layers\.0\..*": 32}},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
    "layers pattern": {
        "target_modules": ["up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "exclude by expression": {
        "target_modules": ["q_proj"],
        "exclude_modules": r".*layers\.0\..*",
    },
    "head": {"target_modules": ["lm_head", "q_proj"]},
}
GPT2_CASES = {
    "gpt2 default targets": {},
    "gpt2 all-linear": {"target_modules": "all-linear"},
    "gpt2 c_proj of both": {"target_modules": ["c_proj", "c_fc"]},
    "gpt2 one layer": {"target_modules": ["c_attn"], "layers_to_transform": [2]},
}
CASES = {**LLAMA_CASES, **GPT2_CASES}


def base_for(case):
    return gpt2() if case in GPT2_CASES else llama()


def largest_difference(mine, theirs):
    with torch.no_grad():
        return (mine(tokens()) - theirs(tokens()).logits).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_loads(case, tmp_path):
    base = base_for(case)
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(base, **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "adapter")
    assert largest_difference(mine, theirs) <= FLOAT32
    assert not any(p.requires_grad for p in mine.parameters())


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_ours_loads_in_peft(case, tmp_path):
    base = base_for(case)
    base.save_pretrained(tmp_path / "base")
    mine = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(mine, lorax.LoRAConfig(**CASES[case]))
    with torch.no_grad():
        for layer in adapter_layers(mine).values():
            layer.lora_A.normal_(std=0.1)
            layer.lora_B.normal_(std=0.1)
    lorax.save_adapter(mine, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert largest_difference(mine, theirs) <= FLOAT32


@pytest.mark.parametrize("case", CASES)
def test_the_same_modules_are_adapted(case, tmp_path):
    base = base_for(case)
    base.save_pretrained(tmp_path)
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **CASES[case]))
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**CASES[case]))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {n: (m.r, m.scaling) for n, m in adapter_layers(mine).items()} == expected


HEAD_COPY = "base_model.model.lm_head.base_layer.weight"


def test_a_head_that_came_with_the_file_is_taken_against_peft(tmp_path, caplog):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    peft_model(base, **CASES["head"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[HEAD_COPY][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "adapter")
    assert "lm_head.base_layer.weight differ from the base's" in caplog.text
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert largest_difference(mine, theirs) <= FLOAT32
    lorax.unload_adapter(mine)
    assert largest_difference(mine, base) <= FLOAT32


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_config_survive_the_round_trip(case, tmp_path):
    """PEFT -> lorax -> PEFT: every tensor's bytes, every field of the config."""
    base = base_for(case)
    base.save_pretrained(tmp_path / "base")
    peft_model(base, **CASES[case]).save_pretrained(tmp_path / "theirs")
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "theirs")
    lorax.save_adapter(mine, tmp_path / "mine")
    one = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    two = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    # PEFT puts a copy of the base's own weight beside an adapted head.
    assert (HEAD_COPY in one) == (case == "head")
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.equal(one[name], two[name]), name
    assert config_as_read(tmp_path / "mine") == config_as_read(tmp_path / "theirs")


@pytest.mark.parametrize("case", ["all-linear", "rslora", "gpt2 all-linear"])
def test_gradients_against_peft(case, tmp_path):
    base = base_for(case)
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(base, **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "adapter", trainable=True)
    for model, logits in ((mine, mine(tokens())), (theirs, theirs(tokens()).logits)):
        model.zero_grad()
        logits.log_softmax(-1)[..., 5].mean().backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, name


def test_an_old_config_with_few_keys_is_read_with_defaults(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(base, target_modules=["q_proj"], r=4, lora_alpha=16)
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    found = json.loads(path.read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out")
    path.write_text(json.dumps({key: found[key] for key in kept}))
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "adapter")
    assert largest_difference(mine, theirs) <= FLOAT32


@pytest.fixture
def adapter(tmp_path):
    """(a base's directory, an adapter's directory)"""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    peft_model(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def refuses(adapter, error, match):
    model = lorax.load_model(adapter[0])
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(error, match=match):
        lorax.load_adapter(model, adapter[1])
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert not any(p.requires_grad for p in model.parameters())


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan", "dtype"])
def test_tensors_that_do_not_fit_are_refused_by_name(fault, adapter):
    path = adapter[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    if fault == "missing":
        del tensors[NAME]
    elif fault == "unexpected":
        tensors[NAME.replace("q_proj", "k_proj")] = torch.zeros(8, 48)
    elif fault == "shape":
        tensors[NAME] = torch.zeros(4, 48)
    elif fault == "nan":
        tensors[NAME][0, 0] = float("nan")
    else:
        tensors[NAME] = tensors[NAME].to(torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})
    word = "k_proj" if fault == "unexpected" else r"layers\.1\.self_attn\.q_proj\.lora_A"
    refuses(adapter, AdapterError, word)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"use_dora": True}, AdapterError, "lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, AdapterError, "LOHA"),
        ({"peft_type": "ADALORA"}, AdapterError, "total_step"),
        ({"bias": "some"}, AdapterError, "bias"),
        ({"lora_alpha": "x"}, FormatError, "lora_alpha"),
        ({"use_something_new": True}, AdapterError, "use_something_new"),
        ({"target_modules": ["qq_proj"]}, AdapterError, "qq_proj"),
        ({"target_modules": 7}, FormatError, "target_modules"),
        ({"rank_pattern": {"(": 3}}, AdapterError, "regular expression"),
    ],
)
def test_configs_that_do_not_fit_are_refused_by_name(change, error, word, adapter):
    path = adapter[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuses(adapter, error, word)


def test_a_newer_key_at_rest_is_ignored(adapter):
    path = adapter[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": None}))
    lorax.load_adapter(lorax.load_model(adapter[0]), adapter[1])


def test_a_pickled_adapter_is_refused_with_a_hint(adapter):
    (adapter[1] / "adapter_model.safetensors").rename(adapter[1] / "adapter_model.bin")
    refuses(adapter, FormatError, "pickle")


def test_an_adapter_that_is_not_finite_is_not_saved(adapter, tmp_path):
    model = lorax.load_model(adapter[0])
    lorax.load_adapter(model, adapter[1])
    next(iter(adapter_layers(model).values())).lora_A.data[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="not finite"):
        lorax.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_again_replaces_the_adapter_and_keeps_what_lies_beside_it(adapter):
    model = lorax.load_model(adapter[0])
    lorax.load_adapter(model, adapter[1])
    (adapter[1] / "notes.txt").write_text("mine")
    next(iter(adapter_layers(model).values())).lora_A.data.fill_(0.5)
    lorax.save_adapter(model, adapter[1])
    assert (adapter[1] / "notes.txt").read_text() == "mine"
    assert (
        load_file(adapter[1] / "adapter_model.safetensors")[NAME.replace("1", "0")] == 0.5
    ).all()
    assert not list(adapter[1].parent.glob(".tmp-*"))


def test_merged_model_opens_in_transformers(adapter, tmp_path):
    model = lorax.load_model(adapter[0])
    lorax.load_adapter(model, adapter[1])
    with torch.no_grad():
        before = model(tokens())
    lorax.unload_adapter(model, merge=True)
    lorax.save_model(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (theirs(tokens()).logits - before).norm() / before.norm() <= 2e-6
