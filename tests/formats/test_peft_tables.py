"""Embeddings and heads that come with an adapter, and resized vocabularies, against PEFT."""

import copy
import warnings

import pytest
import torch
from oracles import llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft_pairs import disturb, largest_difference, logits
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

import lorax
from lorax.errors import AdapterError
from lorax.formats.open_model import open_model
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.parity.against_peft import verify

ROWS = 103  # llama() has 97
WIDE = tokens(vocabulary=ROWS, seed=3)


def trained(folder, settings, *, tables=False, rows=ROWS, **kind):
    """PEFT's model over a base resized to `rows`, saved in folder/a; folder/base has 97."""
    base = llama(**kind)
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")  # PEFT asks where it is from
    base.resize_token_embeddings(rows)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    disturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name or "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if tables and name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved too
        model.save_pretrained(folder / "a", save_embedding_layers=True if tables else "auto")
    return model.eval()


def in_peft(folder, adapter, rows):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(base, adapter).eval()


CASES = {
    "lora alone": ({"target_modules": ["q_proj"]}, {}),
    "tied": ({"target_modules": ["q_proj"]}, {"tie_word_embeddings": True}),
    "both trained as a whole": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {},
    ),
    "adapted": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
    "rows": ({"target_modules": ["q_proj"], "trainable_token_indices": [98, 101]}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resized_vocabulary_against_peft(case, tmp_path):
    settings, kind = CASES[case]
    theirs = trained(tmp_path, settings, **kind)
    mine = lorax.load_model(tmp_path / "base")
    before = mine.state_dict()
    with pytest.raises(AdapterError, match=r"103 rows, the base's 97.*--resize-vocabulary"):
        lorax.load_adapter(mine, tmp_path / "a")
    after = mine.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lorax.load_adapter(mine, tmp_path / "a", resize_vocabulary=True)
    assert mine.config.vocab_size == ROWS
    assert largest_difference(mine, theirs, WIDE) <= 1e-5
    lorax.save_adapter(mine, tmp_path / "mine")
    again = in_peft(tmp_path, tmp_path / "mine", ROWS)
    assert largest_difference(mine, again, WIDE) <= 1e-5
    ours = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(ours, tmp_path / "mine", resize_vocabulary=True)
    assert torch.equal(logits(ours, WIDE), logits(mine, WIDE))


def test_a_smaller_vocabulary_merges_and_opens_in_transformers(tmp_path):
    theirs = trained(tmp_path, {"target_modules": ["q_proj"]}, rows=90)
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "a", resize_vocabulary=True)
    ids = tokens(vocabulary=90)
    assert largest_difference(mine, theirs, ids) <= 1e-5
    model = lorax.unload_adapter(mine, merge=True)
    assert model is mine
    lorax.save_model(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 90
    assert largest_difference(model, merged, ids) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_were_trained_beside_the_adapter_against_peft(tied, tmp_path, caplog):
    kind = {"tie_word_embeddings": tied}
    theirs = trained(tmp_path, {"target_modules": ["q_proj"]}, tables=True, rows=97, **kind)
    mine = lorax.load_model(tmp_path / "base")
    base = logits(mine)
    lorax.load_adapter(mine, tmp_path / "a", trainable=True)
    assert "differ from the base's and are used instead" in caplog.text
    assert largest_difference(mine, theirs) <= 1e-5
    assert all("lora_" in n for n, p in mine.named_parameters() if p.requires_grad)
    lorax.save_adapter(mine, tmp_path / "mine")
    again = in_peft(tmp_path, tmp_path / "mine", 97)
    assert largest_difference(mine, again) <= 1e-5
    with lorax.disabled_adapter(mine):
        assert torch.equal(logits(mine), base)
    lorax.unload_adapter(mine)
    assert torch.equal(logits(mine), base)


def test_equal_tables_are_left_out(tmp_path, caplog):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"]))
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "a")
    assert largest_difference(mine, theirs.eval()) <= 1e-5
    assert "differ" not in caplog.text


@pytest.mark.slow
def test_verify_and_open_model_resize(tmp_path):
    trained(tmp_path, {"target_modules": ["q_proj"]}, rows=300, vocab_size=270)
    write_tokenizer(byte_tokenizer(), tmp_path / "base")
    report = verify(tmp_path / "a", tmp_path / "base", resize_vocabulary=True, tokens=16)
    assert report.holds, str(report)
    model, _ = open_model(str(tmp_path / "a"), str(tmp_path / "base"), resize_vocabulary=True)
    assert model.config.vocab_size == 300
