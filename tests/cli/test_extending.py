"""The blocks of README and docs/extending.md that add something do what they say."""

import json
import re
from pathlib import Path

import torch
import transformers
from command_line import complete_lorax, run_lorax
from safetensors.torch import load_file
from tiny_runs import folder  # noqa: F401 - a fixture

import lorax

ROOT = Path(__file__).parents[2]
TEXT = "".join((ROOT / name).read_text() for name in ("README.md", "docs/extending.md"))


def block_with(call):
    found = [b for b in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if call in b]
    assert len(found) == 1
    return found[0]


def test_the_variant_trains_from_a_recipe_and_merges(folder, tmp_path):  # noqa: F811
    (tmp_path / "mine.py").write_text(block_with("register_variant"))
    (tmp_path / "recipe.toml").write_text(
        f"""
        [model]
        path = "{folder / "model"}"
        [adapter]
        method = "unit-rows"
        r = 4
        target_modules = "all-linear"
        [data]
        path = "{folder / "rows.jsonl"}"
        [train]
        output_dir = "{tmp_path / "run"}"
        max_steps = 2
        """
    )
    for words in (["train", "recipe.toml"], ["merge", "run", "merged"]):
        done = complete_lorax(*words, "--plugin", "mine.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "UNIT_ROWS"
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "lorax loads it, with its plugin" in card
    assert "PeftModel" not in card
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(1, 9)[None]
    assert not torch.equal(again(ids).logits, before(ids).logits)


def test_the_step_hook_writes_into_the_metrics(folder, tmp_path):  # noqa: F811
    (tmp_path / "mine.py").write_text(block_with("register_step_hook"))
    (tmp_path / "recipe.toml").write_text(
        f"""
        [model]
        path = "{folder / "model"}"
        [data]
        path = "{folder / "rows.jsonl"}"
        [train]
        output_dir = "{tmp_path / "run"}"
        hooks = ["norm"]
        max_steps = 2
        """
    )
    plugin = ("--plugin", tmp_path / "mine.py")
    run_lorax("train", tmp_path / "recipe.toml", *plugin)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, metrics) if "loss" in line]
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    norm = sum(tensor.norm().item() ** 2 for tensor in trained) ** 0.5
    assert len(steps) == 2
    assert abs(steps[-1]["norm"] - norm) <= 1e-5 * norm


def test_the_model_against_transformers(tmp_path):
    exec(block_with("register_model"), {})  # noqa: S102 - the page's own lines
    torch.manual_seed(0)
    config = transformers.SeedOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    theirs = transformers.SeedOssForCausalLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "model")
    ours = lorax.load_model(tmp_path / "model")
    ids = torch.arange(20)[None]
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() <= 1e-5
    lorax.save_model(ours, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (again(ids).logits - expected).abs().max() <= 1e-5
