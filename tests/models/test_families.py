"""Qwen 2 and 3, Gemma 2 and 3 and Phi-3, from files that transformers wrote, against its models."""

import itertools
import json

import peft
import pytest
import torch
import transformers
from families import KINDS, PLAIN, family
from oracles import peft_model, tokens
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from transformers import AutoModelForCausalLM

import lorax
from lorax.errors import AdapterError, FormatError, UnsupportedModel
from lorax.inference.batch import stream_rows
from lorax.models.families import FAMILIES
from lorax.training.loss import summed_loss

pytestmark = pytest.mark.slow
TINY = 1e-5  # float32 on tiny models: a few hundred roundings of values around 1


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(directory, lorax's model, transformers')."""
    folder = tmp_path_factory.mktemp("family") / "base"
    family(request.param).save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, lorax.load_model(folder), theirs


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def far(mine, theirs, ids=None):
    ids = tokens(length=60) if ids is None else ids
    return (logits(mine, ids) - logits(theirs, ids)).abs().max().item()


def edit(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def test_logits_beyond_the_window_against_transformers(pair):
    _, mine, theirs = pair
    assert far(mine, theirs) <= TINY
    assert far(mine, theirs, tokens(length=5)) <= TINY


def test_the_cache_gives_what_the_whole_gives(pair):
    _, mine, _ = pair
    ids = tokens(rows=2, length=60)
    cuts = (0, 5, 6, 40, 60) if mine.cache_border is None else (0, 5, 6, 30)
    cache = mine.new_cache(2, 60)
    parts = [logits_from(mine, ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    whole = logits(mine, ids[:, : cuts[-1]])
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= TINY


def logits_from(model, ids, cache):
    with torch.no_grad():
        return model(ids, cache)


def test_generation_past_window_and_border_against_transformers(pair):
    _, mine, theirs = pair
    ids = tokens(rows=1, length=20)
    expected = theirs.generate(
        ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = [token for _, token in stream_rows(mine, (), ids.tolist(), [30]) if token is not None]
    assert found == expected[0, 20:].tolist()


def test_gradients_to_every_weight_and_checkpointing_against_transformers(pair):
    folder, _, theirs = pair
    mine = lorax.load_model(folder).requires_grad_(True)
    mine.gradient_checkpointing = True
    theirs.requires_grad_(True)
    theirs.zero_grad()
    ids = tokens(length=30)
    summed_loss(mine, ids, ids).div(2 * 29).backward()
    theirs(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        scale = max(1.0, expected[name].grad.abs().max().item())
        assert (parameter.grad - expected[name].grad).abs().max() <= 2e-5 * scale, name


def test_the_loss_behind_a_frozen_head_against_transformers(pair):
    """The head's own chunked loss, with the cap where there is one: gradients to an adapter."""
    folder, _, theirs = pair
    base = peft_model(theirs, r=4, target_modules="all-linear")
    base.save_pretrained(folder.parent / "adapter")
    mine = lorax.load_model(folder)
    lorax.load_adapter(mine, folder.parent / "adapter", trainable=True)
    assert far(mine, base) <= 2 * TINY
    ids = tokens(length=30)
    loss = summed_loss(mine, ids, ids).div(2 * 29)
    theirs = base(ids, labels=ids).loss
    loss.backward()
    theirs.backward()
    assert abs(loss.item() - theirs.item()) <= TINY
    expected = {
        n.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for n, p in base.named_parameters()
        if "lora_" in n
    }
    trained = {n: p.grad for n, p in mine.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)
    for name, gradient in trained.items():
        scale = max(1.0, expected[name].abs().max().item())
        assert (gradient - expected[name]).abs().max() <= 2e-5 * scale, name


def test_saved_it_opens_in_transformers_as_what_it_was(pair, tmp_path):
    folder, mine, theirs = pair
    lorax.save_model(mine, tmp_path / "mine")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mine", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.config.model_type == theirs.config.model_type
    assert torch.equal(logits(again, tokens()), logits(theirs, tokens()))
    stated, kept = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "mine")
    )
    assert {**stated, "transformers_version": 0} == {**kept, "transformers_version": 0}


def test_a_config_without_its_file_says_the_same_to_transformers(pair, tmp_path):
    """As for a model from .gguf: every key from the config's own values."""
    folder, _, theirs = pair
    mine = lorax.load_model(folder)
    mine.origin = None
    lorax.save_model(mine, tmp_path / "mine")
    edit(tmp_path / "mine", pad_token_id=0)  # Phi-3's 32000 is beyond this vocabulary
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert far(again, theirs) <= TINY
    assert lorax.load_model(tmp_path / "mine").config == mine.config


@pytest.mark.parametrize("kind", PLAIN)
def test_default_targets_are_those_of_peft(kind, tmp_path):
    family(kind).save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    if kind not in TARGETS:
        with pytest.raises(AdapterError, match="target_modules is not given"):
            lorax.add_adapter(model, lorax.LoRAConfig(r=2))
        return
    theirs = peft.get_peft_model(family(kind), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    lorax.add_adapter(model, lorax.LoRAConfig(r=2))
    lorax.save_adapter(model, tmp_path / "adapter")
    assert set(lorax.read_adapter(tmp_path / "adapter").layers) == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def test_every_family_has_pefts_default():
    for model_type, entry in FAMILIES.items():
        if not entry.model_class.__module__.startswith("lorax.") or model_type == "seed_oss":
            continue  # another test's own
        usual = TARGETS.get(model_type)
        assert entry.model_class.default_targets == (None if usual is None else tuple(usual))


@pytest.mark.parametrize("kind", PLAIN)
def test_an_adapter_from_lorax_in_peft_merged_and_opened(kind, tmp_path):
    """The embedding too: Gemma scales what comes out of it."""
    family(kind).save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base")
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = [*sorted({n.split(".")[-1] for n in names if n != "lm_head"}), "embed_tokens"]
    lorax.add_adapter(model, lorax.LoRAConfig(r=3, target_modules=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    lorax.save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert far(model, theirs) <= 2 * TINY
    adapted = logits(model, tokens())
    lorax.unload_adapter(model, merge=True)
    lorax.save_model(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, tokens()) - adapted).abs().max() <= 3 * TINY


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("start", ["SAMPLE_VOCAB", "RANDOM"])
def test_prompt_tuning_against_peft(kind, start, tmp_path):
    family(kind).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = {"num_virtual_tokens": 4, "prompt_tuning_init": start}
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", **config))
    theirs.eval().save_pretrained(tmp_path / "prompt")
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "prompt")
    ids = tokens(length=30)
    assert (logits(model, ids) - logits(theirs, ids)[:, 4:]).abs().max() <= TINY
    table = model.body.scaled(lorax.load_model(tmp_path / "base").body.embed_tokens.weight)
    fresh = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(fresh, lorax.PromptTuningConfig(num_virtual_tokens=4))
    lorax.unload_adapter(fresh)
    if start == "SAMPLE_VOCAB":  # its rows are the embedding's, as the model scales them
        lorax.add_adapter(fresh, lorax.PromptTuningConfig(**config))
        rows = next(p for p in fresh.parameters() if p.requires_grad)
        assert all((table - row).abs().sum(1).min() < 1e-5 for row in rows)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_a_quantized_checkpoint_is_read_as_it_was_quantized(kind, format, tmp_path):
    family(kind).save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base", quantization=format)
    lorax.save_model(model, tmp_path / "stored")
    again = lorax.load_model(tmp_path / "stored")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    stated = json.loads((tmp_path / "stored/config.json").read_text())
    assert stated["model_type"] == kind
    assert "quantization_config" in stated


@pytest.mark.parametrize("kind", PLAIN)
def test_a_bitsandbytes_checkpoint_of_transformers(kind, tmp_path):
    family(kind).save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "bits")
    mine = lorax.load_model(tmp_path / "bits", dtype="float32")
    expected = lorax.load_model(tmp_path / "base", dtype="float32", quantization="nf4")
    assert torch.equal(logits(mine, tokens()), logits(expected, tokens()))


def test_bfloat16_is_as_close_to_float32_as_transformers_is(pair):
    folder, _, _ = pair
    exact = logits(lorax.load_model(folder), tokens(length=60))
    mine = logits(lorax.load_model(folder, dtype="bfloat16"), tokens(length=60)).float()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    other = (logits(theirs, tokens(length=60)).float() - exact).square().mean().sqrt()
    assert (mine - exact).square().mean().sqrt() <= 1.2 * other


OLD = {
    "qwen2": {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None},
    "qwen3": {"rope_parameters": None, "rope_theta": 1e6, "layer_types": None},
    "gemma2": {"rope_parameters": None, "rope_theta": 2e4, "layer_types": None},
    "gemma3_text": {
        "rope_parameters": None,
        "rope_theta": 3e5,
        "rope_local_base_freq": 700.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": None,
        "sliding_window_pattern": 3,
    },
    "phi3": {
        "rope_parameters": None,
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [1.0, 3.0, 5.0, 7.0],
        },
        "original_max_position_embeddings": 40,
    },
}


@pytest.mark.parametrize("kind", OLD)
def test_the_dialect_of_transformers_4(kind, tmp_path):
    family(kind).save_pretrained(tmp_path)
    edit(tmp_path, **OLD[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    mine = lorax.load_model(tmp_path, "float32")
    assert far(mine, theirs) <= TINY
    assert far(mine, theirs, tokens(length=30)) <= TINY
    lorax.save_model(mine, tmp_path / "again")
    assert far(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), theirs) <= TINY


@pytest.mark.parametrize(
    ("kind", "changes", "error", "word"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, UnsupportedModel, "bidirectional"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, FormatError, "layer_types"),
        ("gemma3_text", {"rope_parameters": [1]}, FormatError, "rope_parameters"),
        ("qwen2", {"use_sliding_window": "yes"}, FormatError, "use_sliding_window"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": None,
                "max_window_layers": -1,
            },
            FormatError,
            "max_window_layers",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, UnsupportedModel, "linear"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1]}}, FormatError, "short_fac"),
        ("phi3", {"partial_rotary_factor": 0.01, "rope_parameters": {}}, FormatError, "partial"),
        ("qwen3", {"model_type": "qwen9"}, UnsupportedModel, "llama, mistral, qwen2, qwen3"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(kind, changes, error, word, tmp_path):
    family(kind).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(error, match=word) as caught:
        lorax.load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bias_that_the_family_has_no_word_for_is_not_merged(tmp_path):
    family("phi3").save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules=["o_proj"], lora_bias=True))
    with pytest.raises(AdapterError, match="no word"):
        lorax.unload_adapter(model, merge=True)
