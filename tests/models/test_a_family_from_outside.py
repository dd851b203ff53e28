"""A family of models in one file outside the package: tests/plugins/olmo2.py."""

import importlib.util
from pathlib import Path

import peft
import pytest
import torch
import transformers
from oracles import LLAMA, randomize, tokens

import lorax
from lorax.errors import UnsupportedModel, UsageError
from lorax.models.families import FAMILIES

PLUGIN = Path(__file__).parent.parent / "plugins/olmo2.py"
TINY = 1e-5


def load_plugin():
    spec = importlib.util.spec_from_file_location("olmo2_plugin", PLUGIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr("lorax.models.families.FAMILIES", dict(FAMILIES))
    return load_plugin()


@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": 1}
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**LLAMA, **ends))
    randomize(model).save_pretrained(tmp_path / "base")
    return model


def logits(model, ids=None):
    with torch.no_grad():
        found = model(tokens(length=40) if ids is None else ids)
    return getattr(found, "logits", found)


def far(mine, theirs):
    return (logits(mine) - logits(theirs)).abs().max().item()


def test_without_it_the_directory_is_refused_by_name(theirs, tmp_path):
    with pytest.raises(UnsupportedModel, match=r"'olmo2' is not covered; lorax loads llama, "):
        lorax.load_model(tmp_path / "base")


def test_logits_cache_and_files_against_transformers(plugin, theirs, tmp_path):
    mine = lorax.load_model(tmp_path / "base")
    assert far(mine, theirs) <= TINY
    cache = mine.new_cache(2, 40)
    with torch.no_grad():
        parts = [mine(part, cache) for part in tokens(length=40).split(13, dim=1)]
    assert (torch.cat(parts, dim=1) - logits(mine)).abs().max() <= TINY
    lorax.save_model(mine, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert isinstance(again, transformers.Olmo2ForCausalLM)
    assert torch.equal(logits(again), logits(theirs))


def test_adapter_and_merge_against_peft(plugin, theirs, tmp_path):
    mine = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(mine, lorax.LoRAConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    lorax.save_adapter(mine, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert far(mine, other) <= 2 * TINY
    again = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(mine))
    adapted = logits(mine)
    lorax.save_model(lorax.unload_adapter(mine, merge=True), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - adapted).abs().max() <= 3 * TINY


def test_quantized_and_read_again(plugin, theirs, tmp_path):
    mine = lorax.load_model(tmp_path / "base", quantization="nf4-dq")
    lorax.save_model(mine, tmp_path / "nf4")
    assert torch.equal(logits(lorax.load_model(tmp_path / "nf4")), logits(mine))


def test_the_same_file_twice_is_nothing_and_another_of_the_name_is_refused(plugin):
    load_plugin()
    with pytest.raises(UsageError, match="'llama' is there as LlamaForCausalLM"):
        lorax.register_model(
            "llama", "LlamaForCausalLM", config=plugin.Olmo2Config, model=plugin.Olmo2
        )
    with pytest.raises(UsageError, match="expected letters"):
        lorax.register_model("", "X", config=plugin.Olmo2Config, model=plugin.Olmo2)
