"""LoRA and DoRA on embeddings against the installed PEFT; tied heads, and merging them."""

import copy

import pytest
import torch
from oracles import gpt2, llama, tokens
from peft import PeftModel
from peft_pairs import (
    assert_same_files,
    gradient_errors,
    in_peft,
    largest_difference,
    logits,
    pair,
    relative_rms,
    save,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.adapters.embedding import LoRAEmbedding
from lorax.errors import AdapterError

FLOAT32 = 1e-5


def tied_llama():
    return llama(tie_word_embeddings=True)


# case -> (model, config, the tables that PEFT saves beside the adapter)
CASES = {
    "embedding": (llama, {"target_modules": ["embed_tokens"]}, ["model.embed_tokens"]),
    "with linears": (
        llama,
        {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True, "lora_dropout": 0.5},
        ["model.embed_tokens"],
    ),
    "both ends": (
        llama,
        {"target_modules": ["embed_tokens", "lm_head"]},
        ["model.embed_tokens", "lm_head"],
    ),
    "by its whole path": (llama, {"target_modules": ["model.embed_tokens"]}, []),
    "by expression": (llama, {"target_modules": r".*embed_tokens"}, ["model.embed_tokens"]),
    "tied": (tied_llama, {"target_modules": ["embed_tokens", "v_proj"]}, ["model.embed_tokens"]),
    "tied head": (tied_llama, {"target_modules": ["lm_head"]}, ["lm_head"]),
    "tied, both ends": (
        tied_llama,
        {"target_modules": ["embed_tokens", "lm_head"]},
        ["model.embed_tokens", "lm_head"],
    ),
    "dora": (
        llama,
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        ["model.embed_tokens"],
    ),
    "gpt2": (gpt2, {"target_modules": ["wte", "c_attn"]}, []),
    "gpt2 positions": (gpt2, {"target_modules": ["wpe"], "use_dora": True}, []),
    "gpt2 both ends": (
        gpt2,
        {"target_modules": ["wte", "lm_head"]},
        ["transformer.wte", "lm_head"],
    ),
}
TIED = [case for case in CASES if case.startswith(("tied", "gpt2")) and "positions" not in case]


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_and_back(case, tmp_path):
    """Logits; then our own files: the same bytes and fields, and PEFT computes the same of them."""
    make, config, tables = CASES[case]
    base = make()
    theirs, mine = pair(base, tmp_path, **config)
    found = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    copies = {name for name in found if "base_layer" in name}
    assert copies == {f"base_model.model.{name}.base_layer.weight" for name in tables}
    assert largest_difference(mine, theirs) <= FLOAT32
    lorax.save_adapter(mine, tmp_path / "mine")
    assert_same_files(tmp_path / "theirs", tmp_path / "mine")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine").eval()
    assert largest_difference(mine, again) <= FLOAT32


@pytest.mark.parametrize("case", ["with linears", "dora", "tied, both ends", "gpt2"])
def test_gradients_against_peft(case, tmp_path):
    make, config, _ = CASES[case]
    theirs, mine = pair(make(), tmp_path, trainable=True, **config)
    for name, error in gradient_errors(mine, theirs).items():
        assert error <= 1e-5, name


def test_a_table_has_no_dropout_as_in_peft(tmp_path):
    theirs, mine = pair(llama(), tmp_path, target_modules=["embed_tokens"], lora_dropout=0.5)
    quiet = logits(mine)
    mine.train()
    theirs.train()
    assert torch.equal(logits(mine), quiet)
    assert largest_difference(mine, theirs) <= FLOAT32


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_start_is_the_base_and_a_is_what_is_zero(use_dora, tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    before = logits(mine)
    config = {"target_modules": ["embed_tokens"], "use_dora": use_dora}
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    layer = mine.model.embed_tokens
    assert isinstance(layer, LoRAEmbedding)
    assert torch.equal(logits(mine), before)
    assert not layer.lora_embedding_A.any()
    assert abs(layer.lora_embedding_B.std().item() - 1) < 0.2
    lorax.unload_adapter(mine)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config, init_lora_weights=False))
    assert mine.model.embed_tokens.lora_embedding_A.any()


@pytest.mark.parametrize("case", CASES)
def test_merged_unmerged_disabled_and_saved(case, tmp_path):
    make, config, _ = CASES[case]
    _, mine = pair(make(), tmp_path, **config)
    adapted = logits(mine)
    with lorax.disabled_adapter(mine):
        base = logits(mine)
    assert torch.equal(base, logits(lorax.load_model(tmp_path / "base")))
    assert relative_rms(adapted, base) > 0.01
    lorax.merge_adapter(mine)
    assert relative_rms(logits(mine), adapted) <= 2e-6
    lorax.unmerge_adapter(mine)
    assert torch.equal(logits(mine), adapted)
    tied = mine.config.tie_word_embeddings
    lorax.unload_adapter(mine, merge=True)
    assert mine.config.tie_word_embeddings == (tied and case not in TIED)
    lorax.save_model(mine, tmp_path / "merged")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative_rms(opened(tokens()).logits, adapted) <= 2e-6


def test_a_tied_head_does_not_see_the_adapted_table_and_peft_s_merge_loses_that(tmp_path):
    """PEFT's head reads the base's table, as ours; after its merge it reads the changed one.

    ensure_weight_tying is off, as it is by default. lorax unties; that is what was trained.
    """
    theirs, mine = pair(tied_llama(), tmp_path, target_modules=["embed_tokens"])
    adapted = logits(mine)
    ids = tokens()
    with torch.no_grad():
        hidden = mine.hidden_states(ids)
        table = mine.model.embed_tokens.base_layer.weight
        assert relative_rms(hidden @ table.T, adapted) <= 1e-6
        merged = theirs.merge_and_unload()(ids).logits
    assert relative_rms(merged, adapted) > 0.01
    lorax.unload_adapter(mine, merge=True)
    assert torch.equal(mine.lm_head.weight, table)
    assert relative_rms(logits(mine), adapted) <= 2e-6


def test_a_table_that_came_with_the_file_is_taken_against_peft(tmp_path):
    base = llama()
    pair(base, tmp_path, target_modules=["embed_tokens"])
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "theirs")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert largest_difference(mine, theirs) <= 1e-5


def test_a_bias_on_a_table_is_refused_and_the_model_stays(tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    before = [(n, id(m)) for n, m in mine.named_modules()]
    config = lorax.LoRAConfig(target_modules=["q_proj", "embed_tokens"], lora_bias=True)
    with pytest.raises(AdapterError, match="embed_tokens: lora_bias"):
        lorax.add_adapter(mine, config)
    assert [(n, id(m)) for n, m in mine.named_modules()] == before
    with pytest.raises(ValueError, match="lora_bias"):
        in_peft(llama(), target_modules=["embed_tokens"], lora_bias=True)


@pytest.mark.parametrize("use_dora", [False, True])
def test_in_bfloat16_a_merged_table_is_rounded_once(use_dora, tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path, "bfloat16")
    config = {"target_modules": ["embed_tokens"], "init_lora_weights": False}
    lorax.add_adapter(mine, lorax.LoRAConfig(**config, use_dora=use_dora))
    (layer,) = adapter_layers(mine).values()
    lorax.merge_adapter(mine)
    assert torch.equal(layer.merged.weight, layer.effective_weight().bfloat16())
    assert layer(tokens()).dtype == torch.bfloat16


@pytest.mark.nightly
def test_smollm2_against_peft(smollm2_gguf, tmp_path):
    folder, file = smollm2_gguf.rsplit("/", 1)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    ids = tokens(1, 48, 49152)
    config = {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 1}
    theirs = in_peft(base, **config)
    save(theirs, tmp_path / "adapter")
    mine = lorax.load_model(smollm2_gguf)
    lorax.load_adapter(mine, tmp_path / "adapter", trainable=True)
    with torch.no_grad():
        expected = theirs(ids).logits
        adapted = mine(ids)
    assert relative_rms(adapted, expected) <= 1e-5
    assert max(gradient_errors(mine, theirs, ids).values()) <= 1e-5
    lorax.unload_adapter(mine, merge=True)
    assert relative_rms(logits(mine, ids), adapted) <= 2e-6
