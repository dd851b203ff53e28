"""`lorax verify` takes the base as the run recorded it, and needs no tokenizer."""

import json

import pytest
from oracles import llama
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.errors import LoraxError, UsageError
from lorax.formats.tokenizer_files import write_tokenizer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def base(tmp_path):
    """Widths that are multiples of 64, where bitsandbytes' decoder is right."""
    tokenizer = byte_tokenizer()
    model = llama(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, **HEADS)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tokenizer, tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say ", "completion": "bb"}\n' * 4)
    return tmp_path / "base"


def adapter_over(base, path):
    model = lorax.load_model(base)
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, init_lora_weights=False))
    lorax.save_adapter(model, path)
    return path


@pytest.mark.parametrize(
    "model",
    [{"quantization": "nf4-dq", "dtype": "bfloat16"}, {"dtype": "bfloat16"}, {}],
    ids=["qlora", "bfloat16", "plain"],
)
def test_a_run_is_verified_over_the_base_it_was_trained_over(base, tmp_path, model):
    values = {
        "model": {"path": str(base), **model},
        "adapter": {"r": 2},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "learning_rate": 1e-2},
    }
    run = lorax.train(lorax.Recipe.from_dict(values)).output_dir
    said: list[str] = []
    report = lorax.verify(run, tokens=24, say=said.append)
    assert report.holds, report
    assert report.quantization == model.get("quantization")
    assert any("config.toml" in line for line in said) == bool(model)
    assert lorax.verify(run, tokens=24, quantization="none").quantization is None


def test_without_a_tokenizer_random_tokens_go_through_both(base, tmp_path):
    adapter = adapter_over(base, tmp_path / "a")
    (base / "tokenizer.json").unlink()
    report = lorax.verify(adapter, tokens=24)
    assert report.holds, report
    assert any("random tokens" in note for note in report.notes)
    with pytest.raises(LoraxError, match="tokenizer"):  # a text cannot be read without one
        lorax.verify(adapter, text=tmp_path / "rows.jsonl")


def test_the_adapters_own_tokenizer_is_enough(base, tmp_path):
    adapter = adapter_over(base, tmp_path / "a")
    (base / "tokenizer.json").unlink()
    write_tokenizer(byte_tokenizer(), adapter)
    report = lorax.verify(adapter, tokens=24)
    assert report.holds, report
    assert not any("random tokens" in note for note in report.notes)


def test_a_recorded_format_that_verify_lacks_names_the_way_out(base, tmp_path):
    adapter_over(base, tmp_path / "run" / "adapter")
    recipe = f'[model]\npath = {json.dumps(str(base))}\nquantization = "int8"\n'
    (tmp_path / "run" / "config.toml").write_text(recipe)
    with pytest.raises(UsageError, match="none for the plain weights"):
        lorax.verify(tmp_path / "run")
    assert lorax.verify(tmp_path / "run", quantization="none").quantization is None
