"""Prompts with different adapters, answered together: token for token what each gets alone."""

import pytest
import torch
from oracles import gpt2, llama
from peft_pairs import in_peft, save
from test_rows_together import answers, prompts
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.adapters.lora import LoRALinear
from lorax.backend import backend
from lorax.errors import UsageError
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.inference.batch import Sampling
from lorax.inference.native import library
from lorax.inference.products import FastLinear, FastRows
from lorax.inference.twins import with_twins

SIZES = {
    "llama": {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 261, "n_embd": 64, "n_layer": 2},
}  # fmt: skip
MAKE = {"llama": llama, "gpt2": gpt2}
ALL = {"target_modules": "all-linear"}
ADAPTERS = {
    "a": {"r": 4, **ALL},
    "b": {"r": 7, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "c_attn"]},
    "c": {"r": 2, "lora_bias": True, **ALL},
    "dora": {"r": 4, "use_dora": True, **ALL},
    "tokens": {"r": 4, "trainable_token_indices": [65, 66, 70], **ALL},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "wte", "c_fc", "v_proj"]},
}
PLAIN = ["a", "b", None, "c", "a"]  # one for each of test_rows_together's prompts
OTHERS = ["dora", "a", "tokens", "embedding", None]
COUNT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family, make in MAKE.items():
        torch.manual_seed(0)
        base, made[family] = make(**SIZES[family]), tmp_path_factory.mktemp(family)
        base.save_pretrained(made[family] / "base")
        write_tokenizer(byte_tokenizer(), made[family] / "base")
        for name, settings in ADAPTERS.items():
            save(in_peft(base, **settings), made[family] / name)
    return made


def opened(folder, names, dtype="float32", quantization=None):
    model = lorax.load_model(folder / "base", dtype, quantization=quantization)
    for name in dict.fromkeys(names):
        if name is not None:
            lorax.load_adapter(model, folder / name, name=name)
    return model


def alone(model, names, **options):
    """What each prompt gets in a batch of one with its adapter in use."""
    found = []
    for row, name in zip(prompts(high=261), names, strict=True):
        with lorax.use_adapter(model, name):
            found += answers(model, [row], COUNT, **options)
    return found


def together(model, names, batch_size=4, **options):
    found = prompts(high=261)
    return answers(model, found, COUNT, adapters=names, batch_size=batch_size, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
@pytest.mark.parametrize("family", MAKE)
def test_each_prompt_gets_what_its_adapter_gives_it_alone(folders, family, quantization, dtype):
    model = opened(folders[family], PLAIN, dtype, quantization)
    expected = alone(model, PLAIN)
    assert together(model, PLAIN) == expected
    assert together(model, PLAIN, batch_size=1) == expected
    assert alone(model, ["a"] * 5) != expected != alone(model, [None] * 5)
    assert lorax.named_adapters(model).active is None


@pytest.mark.parametrize("family", MAKE)
def test_so_do_adapters_that_are_more_than_low_rank(folders, family):
    model = opened(folders[family], OTHERS)
    expected = alone(model, OTHERS)
    assert together(model, OTHERS, batch_size=5) == expected
    with backend("pytorch"):
        assert together(model, OTHERS, batch_size=3) == alone(model, OTHERS)


def test_int8_keeps_its_rows_apart(folders):
    model = opened(folders["llama"], PLAIN, quantization="int8")
    assert together(model, PLAIN) == alone(model, PLAIN)


def test_draws_are_each_prompts_own(folders):
    model, sampling = opened(folders["llama"], PLAIN), Sampling(1.0, 0.9, seed=5)
    assert together(model, PLAIN, sampling=sampling) == alone(model, PLAIN, sampling=sampling)


def test_more_adapters_than_the_budget_are_answered_in_turn(folders):
    model = opened(folders["llama"], PLAIN)
    expected = alone(model, PLAIN)
    adapters = lorax.named_adapters(model)
    for budget in (1, 2):
        adapters.budget = budget
        assert together(model, PLAIN) == expected
        assert len(adapters.in_memory) <= budget


def test_a_watched_module_computes_by_itself(folders):
    model = opened(folders["llama"], PLAIN)
    expected = alone(model, PLAIN)
    seen = []
    layer = model.model.layers[1]
    hook = layer.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    assert together(model, PLAIN) == expected
    assert max(seen) > 1
    hook.remove()
    lorax.use_adapter(model, "b")
    hook = model.register_forward_hook(lambda *_: None)
    assert together(model, PLAIN) == expected
    assert lorax.named_adapters(model).active == "b"


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
def test_the_weight_is_read_once_and_the_bits_are_each_rows_own(folders, quantization, monkeypatch):
    model = opened(folders["llama"], PLAIN, quantization=quantization)
    with lorax.named_adapters(model).standing(["a", "b", "c", None]) as groups:
        twin = with_twins(model)
    fast = twin.model.layers[0].self_attn.q_proj
    assert isinstance(fast, FastRows)
    for names in (["a", "b", None, "c", "c"], [None, "a"], ["c"] * 3, ["b", "a"] * 8):
        groups.set(names)
        x = torch.randn(len(names), 1, 64)
        expected = []
        for name, row in zip(names, x, strict=True):
            expected.append(fast.base(row) if name is None else fast.twins[name](row))
        assert torch.equal(fast(x), torch.stack(expected))
    calls = []
    monkeypatch.setattr(FastLinear, "forward", lambda self, x: calls.append(x) or x)
    groups.set(["a", "b", None])
    fast(torch.randn(3, 1, 64))
    assert calls == []  # one call of native.c for all three
    assert isinstance(fast.twins["a"].layer, LoRALinear)


def test_generate_takes_an_adapter_for_each_prompt(folders):
    model = opened(folders["llama"], ["a", "b"])
    tokenizer = lorax.load_tokenizer(folders["llama"] / "base")
    texts, names = ["Once upon", "a time", "there"], ["a", None, "b"]
    expected = []
    for text, name in zip(texts, names, strict=True):
        with lorax.use_adapter(model, name):
            expected.append(lorax.generate(model, tokenizer, text, max_new_tokens=8))
    found = lorax.generate(model, tokenizer, texts, max_new_tokens=8, adapters=names)
    assert found == expected
    assert lorax.generate(model, tokenizer, "there", max_new_tokens=8, adapters=["b"]) == found[2]
    for wrong, message in (
        (["a"], "1 names for 3 rows"),
        (["a", "b", "x"], "no adapter is named 'x'"),
        ("abc", "'abc' for 3 rows"),
    ):
        with pytest.raises(UsageError, match=message):
            lorax.generate(model, tokenizer, texts, adapters=wrong)
