"""Each way in which config.json says something, against what transformers makes of the same file.

A case is a class, what its config has in small, and a change of config.json as it lies on the disk;
the weights are those of the class. Both programs read the same directory.
"""

import itertools
import json
import math

import pytest
import torch
from oracles import GPT2, LLAMA, gpt2, llama, mistral, randomize, tokens
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

import lorax
from lorax.errors import FormatError, LoraxError, UnsupportedModel
from lorax.formats.model_config import read_config
from lorax.models.activations import ACTIVATIONS
from lorax.models.llama import Llama

TINY = 1e-5  # float32, tiny models: a few hundred roundings of values around 1
GONE = object()  # a key to take away
MAKE = {"llama": llama, "mistral": mistral, "gpt2": gpt2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def edit(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not GONE}))


def both(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lorax.load_model(folder, "float32"), theirs


def difference(mine, theirs, ids):
    with torch.no_grad():
        return (mine(ids) - theirs(ids).logits).abs().max().item()


def old_rope(theta=1e4, **scaling):
    return {"rope_parameters": GONE, "rope_theta": theta, "rope_scaling": scaling or None}


def new_rope(theta=1e4, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "theta in rope_parameters": new_rope(5e5),
    "theta beside": old_rope(5e5),
    "no theta": {"rope_parameters": GONE},
    "null parameters": {"rope_parameters": None},
    "theta beside parameters without one": {"rope_parameters": {"factor": 2}, "rope_theta": 5e5},
    "theta inside counts": {**new_rope(5e5), "rope_theta": 1e3},
    "scaling counts before parameters": {
        **new_rope(5e5), "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "no type": old_rope(factor=4.0),
    "partial, which default ignores": {**new_rope(), "partial_rotary_factor": 0.5},
    "linear, type": old_rope(type="linear", factor=2.0),
    "linear, whole number": old_rope(rope_type="linear", factor=4),
    "linear, new": new_rope(rope_type="linear", factor=2.5),
    "rope_type counts before type": old_rope(type="dynamic", rope_type="linear", factor=2.0),
    "dynamic, within": {**old_rope(type="dynamic", factor=2.0)},
    "dynamic, beyond": {**old_rope(type="dynamic", factor=2.0), "max_position_embeddings": 40},
    "dynamic, new": {**new_rope(rope_type="dynamic", factor=3.5), "max_position_embeddings": 70},
    "llama3": old_rope(5e5, type="llama3", **LLAMA3, original_max_position_embeddings=64),
    "llama3, no original": new_rope(rope_type="llama3", **LLAMA3),
    "llama3, original beside": {
        **old_rope(rope_type="llama3", **LLAMA3, original_max_position_embeddings=64),
        "original_max_position_embeddings": 128,
    },
    "yarn": new_rope(**YARN),
    "yarn, type": old_rope(type="yarn", factor=4.0, original_max_position_embeddings=64),
    "yarn, no original": old_rope(rope_type="yarn", factor=2.0),
    "yarn, factor null": new_rope(**{**YARN, "factor": None}),
    "yarn, factor 1": new_rope(**{**YARN, "factor": 1.0}),
    "yarn, betas": new_rope(**YARN, beta_fast=8, beta_slow=0.5),
    "yarn, betas null": new_rope(**YARN, beta_fast=None, beta_slow=None),
    "yarn, no truncation": new_rope(**YARN, truncate=False),
    "yarn, attention_factor": new_rope(**YARN, attention_factor=0.7),
    "yarn, mscale": new_rope(**YARN, mscale=0.8, mscale_all_dim=0.5),
    "yarn, mscale alone": new_rope(**YARN, mscale=0.8),
    "yarn, one step": new_rope(**YARN, beta_fast=1, beta_slow=1, truncate=False),
}  # fmt: skip


MISTRALS = ("theta beside", "linear, new", "dynamic, beyond", "llama3", "yarn, mscale")


@pytest.mark.parametrize(
    ("family", "rope"), [("llama", r) for r in ROPES] + [("mistral", r) for r in MISTRALS]
)
def test_rotary_dialects_against_transformers(family, rope, tmp_path):
    MAKE[family]().save_pretrained(tmp_path)
    edit(tmp_path, **ROPES[rope])
    assert difference(*both(tmp_path), tokens(length=100)) <= TINY


def test_no_two_ways_of_turning_are_the_same(tmp_path):
    """Else the comparisons above would show nothing."""
    llama().save_pretrained(tmp_path)
    seen = []
    for rope in ("no theta", "theta beside", "linear, type", "dynamic, beyond", "llama3", "yarn"):
        edit(tmp_path, **{"max_position_embeddings": 256, "rope_scaling": None}, **{})
        edit(tmp_path, **ROPES[rope])
        with torch.no_grad():
            seen.append(lorax.load_model(tmp_path)(tokens(length=100)))
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 0.01 for other in seen[:i])


OTHERS = {
    "llama: heads null": ("llama", {"num_key_value_heads": 6}, {"num_key_value_heads": None}),
    "llama: head_dim null": ("llama", {}, {"head_dim": None}),
    "llama: head_dim missing": ("llama", {}, {"head_dim": GONE}),
    "llama: heads missing": ("llama", {"num_key_value_heads": 6}, {"num_key_value_heads": GONE}),
    "llama: eps missing": ("llama", {}, {"rms_norm_eps": GONE}),
    "llama: biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama: biases missing": ("llama", {}, {"attention_bias": GONE, "mlp_bias": GONE}),
    "llama: swish": ("llama", {}, {"hidden_act": "swish"}),
    "llama: gelu": ("llama", {}, {"hidden_act": "gelu"}),
    "llama: relu2": ("llama", {}, {"hidden_act": "relu2"}),
    "llama: window, which is none": ("llama", {}, {"sliding_window": 8}),
    "llama: dropout": ("llama", {}, {"attention_dropout": 0.5, "pretraining_tp": 2}),
    "llama: tied": ("llama", {"tie_word_embeddings": True}, {}),
    "mistral: biases, which are none": ("mistral", {}, {"attention_bias": True, "mlp_bias": True}),
    "mistral: eps missing": ("mistral", {}, {"rms_norm_eps": GONE, "hidden_act": GONE}),
    "mistral: heads missing": (
        "mistral", {"num_key_value_heads": 8, "num_attention_heads": 8, "head_dim": 6},
        {"num_key_value_heads": GONE},
    ),
    "mistral: tied": ("mistral", {"tie_word_embeddings": True}, {}),
    "gpt2: aliases": ("gpt2", {}, {
        "n_embd": GONE, "n_layer": GONE, "n_head": GONE, "n_positions": GONE, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256,
    }),
    "gpt2: aliases count": ("gpt2", {}, {
        "n_head": 12, "num_attention_heads": 4, "n_layer": 12, "num_hidden_layers": 3,
    }),
    "gpt2: n_inner missing": ("gpt2", {}, {"n_inner": GONE}),
    "gpt2: n_inner": ("gpt2", {"n_inner": 77}, {}),
    "gpt2: no scale": ("gpt2", {}, {"scale_attn_weights": False}),
    "gpt2: by layer": ("gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2: by layer alone": ("gpt2", {}, {
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
    }),
    "gpt2: upcast": ("gpt2", {}, {
        "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True,
    }),
    "gpt2: dropout": ("gpt2", {}, {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "gpt2: short": ("gpt2", {}, {
        "layer_norm_epsilon": GONE, "activation_function": GONE, "tie_word_embeddings": GONE,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_dialects_against_transformers(case, tmp_path):
    family, options, changes = OTHERS[case]
    MAKE[family](**options).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    assert difference(*both(tmp_path), tokens(length=60)) <= TINY


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_transformers(name):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 40.0, -40.0])])
    assert (ACTIVATIONS[name](x) - ACT2FN[name](x)).abs().max() <= 2e-6 * 40


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in ("silu", "swish")])
def test_gpt2_activations_against_transformers(name, tmp_path):
    gpt2().save_pretrained(tmp_path)
    edit(tmp_path, activation_function=name)
    assert difference(*both(tmp_path), tokens(length=20)) <= 2 * TINY


def test_every_activation_of_transformers_is_there_or_has_weights():
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}


CONFIGS = [
    *(LlamaConfig, MistralConfig, GPT2Config, Qwen2Config, Qwen3Config),
    *(Gemma2Config, Gemma3TextConfig, Phi3Config),
]


@pytest.mark.parametrize("make", CONFIGS)
def test_a_missing_key_means_transformers_default(make):
    """All keys missing, and each alone where the others are unlike the defaults."""
    config = make()
    kind = config.model_type
    full = json.loads(json.dumps(config.to_dict()))
    expected = read_config(full, "x")
    assert read_config({"model_type": kind}, "x") == expected
    for key in full:
        short = {k: v for k, v in full.items() if k != key}
        if key != "model_type":
            assert read_config(short, "x") == expected


WINDOWS = [1, 2, 7, 64, 99, 100, 101, 4096, None, GONE]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "missing" if w is GONE else str(w))
def test_the_window_against_transformers(window, tmp_path):
    mistral().save_pretrained(tmp_path)
    edit(tmp_path, sliding_window=window)
    assert difference(*both(tmp_path), tokens(length=100)) <= TINY


@pytest.mark.parametrize(("window", "positions"), [(4096, 64), (64, 64), (64, 4096)])
def test_a_window_and_how_many_positions_there_are(window, positions, tmp_path):
    mistral(sliding_window=window, max_position_embeddings=positions).save_pretrained(tmp_path)
    assert difference(*both(tmp_path), tokens(length=64)) <= TINY


def test_a_missing_window_is_4096_and_that_acts():
    ids = tokens(rows=1, length=4200)
    shape = {**LLAMA, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = MistralConfig(**{**shape, "max_position_embeddings": 8192})
    theirs = randomize(MistralForCausalLM(config))
    values = {k: v for k, v in config.to_dict().items() if k != "sliding_window"}
    mine = Llama(read_config(values, "x"))
    mine.load_state_dict(theirs.state_dict())
    plain = Llama(read_config({**values, "sliding_window": None}, "x"))
    plain.load_state_dict(theirs.state_dict())
    assert difference(mine, theirs, ids) <= TINY
    with torch.no_grad():
        assert (plain(ids) - mine(ids))[:, 4096:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": 2}),
        ("mistral", {"sliding_window": 300}),
        ("llama", ROPES["dynamic, beyond"]),
        ("llama", ROPES["yarn"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_generation_past_it_with_the_cache_against_transformers(family, changes, tmp_path):
    """Past the window, or past the trained context; greedily, token by token.

    A window of 1 is left out: there the cache of transformers 5.23 keeps every key (it cuts at
    -0), so that it generates something else than its own forward pass without a cache says.
    """
    MAKE[family]().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    mine, theirs = both(tmp_path)
    ids = tokens(rows=1, length=30)
    expected = theirs.generate(
        ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    cache = mine.new_cache(1, 60)
    found, given = ids, ids
    with torch.inference_mode():
        for _ in range(30):
            given = mine(given, cache)[:, -1:].argmax(-1)
            found = torch.cat([found, given], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cuts", [(0, 30, 31, 60), (0, 1, 2, 3, 60), (0, 5, 25, 45, 60)])
@pytest.mark.parametrize("window", [1, 6, 40])
def test_the_window_in_parts_is_that_of_the_whole(window, cuts, tmp_path):
    mistral(sliding_window=window).save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    ids = tokens(rows=2, length=60)
    cache = mine.new_cache(2, 60)
    with torch.no_grad():
        parts = [mine(ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
        assert (torch.cat(parts, dim=1) - mine(ids)).abs().max() <= TINY


def test_gradients_through_the_window_against_transformers(tmp_path):
    mistral(sliding_window=9).save_pretrained(tmp_path)
    mine, theirs = both(tmp_path)
    ids = tokens(rows=2, length=40)
    for model in (mine, theirs):
        model.requires_grad_(True)
    mine(ids).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        scale = expected[name].grad.abs().max().item()
        error = (parameter.grad - expected[name].grad).abs().max().item()
        assert error <= 1e-5 * max(scale, 1.0), name


DTYPES = [
    ({"dtype": "bfloat16"}, torch.bfloat16),
    ({"torch_dtype": "float16"}, torch.float16),
    ({"torch_dtype": "float16", "dtype": "bfloat16"}, torch.bfloat16),
    ({"torch_dtype": "float16", "dtype": None}, torch.float16),
    ({"torch_dtype": None, "dtype": None}, torch.float32),
    ({}, torch.float32),
]


@pytest.mark.parametrize(("stated", "expected"), DTYPES)
def test_auto_is_what_the_config_says_else_the_file(stated, expected, tmp_path):
    llama().save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", dtype=GONE)
    edit(tmp_path / "m", **stated)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    mine = lorax.load_model(tmp_path / "m")
    assert {p.dtype for p in mine.parameters()} == {expected} == {theirs.dtype}


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("has_prefix", [True, False])
def test_names_of_tensors_and_buffers_that_are_none(family, has_prefix, tmp_path):
    theirs = MAKE[family]()
    theirs.save_pretrained(tmp_path)
    prefix = "transformer." if family == "gpt2" else "model."
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    buffers = ("h.0.attn.bias", "h.0.attn.masked_bias") if family == "gpt2" else (
        "layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"
    )  # fmt: skip
    tensors |= {prefix + name: torch.ones(3) for name in buffers}
    if not has_prefix:
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert difference(lorax.load_model(tmp_path), theirs, tokens()) <= TINY
    if has_prefix:
        assert difference(*both(tmp_path), tokens()) <= TINY


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("head", ["equal", "another", "alone"])
def test_a_head_in_the_file_of_a_tied_model_against_transformers(family, head, tmp_path):
    theirs = MAKE[family](tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = lorax.load_model(tmp_path).embedding_name
    tensors["lm_head.weight"] = tensors[name].clone()
    if head == "another":
        tensors["lm_head.weight"] *= 2
    if head == "alone":
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    mine, theirs = both(tmp_path)
    assert difference(mine, theirs, tokens()) <= TINY
    assert mine.config.tie_word_embeddings == (head != "another")
    lorax.save_model(mine, tmp_path / "again")
    assert difference(*both(tmp_path / "again"), tokens()) <= TINY
    assert AutoConfig.from_pretrained(tmp_path / "again").tie_word_embeddings == (head != "another")


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"model_type": "qwen2_moe"}, "qwen2_moe"),
        ("llama", {"model_type": GONE}, "model_type None"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"text_config": {"model_type": "llama"}}, "text_config"),
        ("mistral", {"model_type": "mistral3"}, "mistral3"),
        ("llama", {"hidden_act": "xielu"}, "xielu"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("gpt2", {"activation_function": "prelu"}, "prelu"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", old_rope(type="longrope", factor=2.0), "longrope"),
        ("llama", old_rope(rope_type="proportional"), "proportional"),
        ("llama", old_rope(rope_type=None), "rope_type"),
        ("llama", {**old_rope(type="linear", factor=2.0), "partial_rotary_factor": 0.5}, "partial"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(family, changes, word, tmp_path):
    MAKE[family]().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=word):
        lorax.load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "4096"}, "sliding_window"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        (old_rope(type="linear"), "factor"),
        (old_rope(type="linear", factor="2"), "factor"),
        (old_rope(type="dynamic", factor=-1), "factor"),
        (old_rope(type="yarn"), "factor"),
        (old_rope(1, type="yarn", factor=2.0), "rope_theta"),
        (old_rope(type="yarn", factor=2.0, beta_fast=1e300), "beta_fast"),
        (old_rope(type="yarn", factor=2.0, truncate="no"), "truncate"),
        (old_rope(type="yarn", factor=2.0, original_max_position_embeddings=0), "original"),
        (old_rope(type="llama3", factor=2.0, low_freq_factor=4, high_freq_factor=4), "high_freq"),
        ({**old_rope(type="dynamic", factor=2.0), "head_dim": 2}, "dynamic"),
        (old_rope(math.pi * 1e300), "rope_theta"),
    ],
)
def test_an_impossible_value_is_refused_by_key(changes, word, tmp_path):
    mistral().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(FormatError, match=word) as caught:
        lorax.load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_wild_but_possible_numbers_end_in_numbers_or_an_error(tmp_path):
    llama().save_pretrained(tmp_path)
    for kind in ("linear", "dynamic", "yarn", "llama3"):
        for value in (1e-12, 1e12):
            values = {"factor": value, "low_freq_factor": 1e-12, "high_freq_factor": value}
            edit(tmp_path, **old_rope(type=kind, **values, beta_fast=value, beta_slow=value))
            try:
                lorax.load_model(tmp_path)(tokens(length=8))
            except LoraxError as error:
                assert "freq_factor" in str(error)  # noqa: PT017


def test_sizes_of_the_oracles_are_unlike_the_defaults():
    """Else a key that is not read would not show."""
    for config, small in ((LlamaConfig(), LLAMA), (GPT2Config(), GPT2)):
        assert all(getattr(config, key) != value for key, value in small.items())
    assert LlamaForCausalLM.config_class is LlamaConfig
