"""The trial: VeRA from one file outside the package works in every command, and PEFT agrees."""

import json
import re
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from command_line import run_lorax
from oracles import llama
from peft import PeftModel, VeraConfig, get_peft_model
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

import lorax
from lorax import cli
from lorax.adapters import variants
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError
from lorax.formats.tokenizer_files import write_tokenizer

VERA = Path(__file__).parent.parent / "plugins" / "vera.py"
IDS = torch.arange(60, 80)[None]
SETTINGS = {"r": 8, "target_modules": "all-linear", "projection_prng_key": 3}


@pytest.fixture(scope="module")
def plugin():
    return lorax.load_plugin(VERA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base and rows to train on."""
    folder = tmp_path_factory.mktemp("vera")
    torch.manual_seed(0)
    llama(vocab_size=261).save_pretrained(folder / "base")
    write_tokenizer(byte_tokenizer(), folder / "base")
    rows = [{"prompt": f"say {'a' * (i % 5)} ", "completion": "b" * (i % 3 + 1)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_recipe(folder, plugins):
    values = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "adapter": {"method": "vera", **SETTINGS},
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {"output_dir": str(folder / "run"), "batch_size": 4, "micro_batch_size": 4,
                  "learning_rate": 0.05, "max_steps": 4, "save_steps": 2},
    }  # fmt: skip
    values |= {"plugins": plugins} if plugins else {}
    (folder / "recipe.toml").write_text(tomli_w.dumps(values))


@pytest.fixture(scope="module")
def run(folder, plugin):
    """The run's directory."""
    write_recipe(folder, [str(VERA)])
    run_lorax("train", folder / "recipe.toml")
    return folder / "run"


@pytest.fixture
def base(folder):
    return lorax.load_model(folder / "base")


def without_the_plugin(monkeypatch):
    table = {name: v for name, v in variants._table.items() if name != "vera"}
    monkeypatch.setattr(variants, "_table", table)


def failing(*arguments, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["lorax", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, " ".join(capfd.readouterr().err.split())


def test_the_dry_run_names_it(folder, plugin):
    write_recipe(folder, [str(VERA)])
    said = run_lorax("train", folder / "recipe.toml", "--dry-run")
    assert "VeRA of rank 8, seed 3; the run leaves" in said


def test_a_run_trains_and_names_its_plugin(run):
    assert VERA.is_absolute()
    assert f'plugins = [\n    "{VERA}",\n]' in (run / "config.toml").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    card = (run / "adapter" / "README.md").read_text()
    assert "# VeRA adapter" in card
    assert "VeRA of rank 8, seed 3. PEFT and lorax load it" in card
    values = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["projection_prng_key"]) == ("VERA", 3)


def test_a_resumed_run_ends_with_the_same_bits(folder, run, plugin, tmp_path):
    class Stop(lorax.StepHook):
        def __init__(self, model):
            self.steps = 0

        def after_step(self):
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt
            return {}

    override = {"train.output_dir": str(tmp_path / "again")}
    recipe = lorax.Recipe.load(folder / "recipe.toml", override)
    with pytest.raises(KeyboardInterrupt):
        lorax.train(recipe, hooks=[Stop])
    lorax.train(recipe, resume=True)
    one, other = (d / "adapter" / "adapter_model.safetensors" for d in (run, tmp_path / "again"))
    from safetensors.torch import load_file

    one, other = load_file(one), load_file(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_peft_opens_it_and_gives_the_same_logits(run, folder, base, plugin):
    lorax.load_adapter(base, run / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base")
    with pytest.warns(UserWarning, match="save_projection"):
        theirs = PeftModel.from_pretrained(theirs, run / "adapter").eval()
    with torch.no_grad():
        plain = lorax.load_model(folder / "base")(IDS)
        mine, other = base(IDS), theirs(IDS).logits
    assert (mine - plain).abs().max() > 1e-3  # it was trained
    assert (mine - other).abs().max() <= 1e-5


def test_lorax_opens_peft_s(folder, base, plugin, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = VeraConfig(r=5, target_modules=["q_proj", "down_proj"], save_projection=False)
    theirs = get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
        other = theirs(IDS).logits
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    del values["vera_dropout"], values["init_weights"]  # this VeRA has LoRA's words for them
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    lorax.load_adapter(base, tmp_path)
    with torch.no_grad():
        assert (base(IDS) - other).abs().max() <= 1e-5 * other.abs().max()


def test_the_pair_is_one_for_all_layers(base, plugin):
    lorax.add_adapter(base, plugin.VeRAConfig(**SETTINGS))
    assert len({id(layer.projection) for layer in adapter_layers(base).values()}) == 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"projection_prng_key": 4}, "projection_prng_key is 4, was 3"), ({"d_initial": 1}, "d_init")],
)
def test_an_edited_seed_is_refused_by_name(changes, word, run, base, tmp_path):
    for file in (run / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(AdapterError, match=word):
        lorax.load_adapter(base, tmp_path)


def test_every_command_takes_it(run, folder, tmp_path):
    plugin = ["--plugin", VERA]
    run_lorax("evaluate", run, "--data", folder / "rows.jsonl", *plugin)
    run_lorax("generate", run, "say ", "--max-new-tokens", 2, *plugin)
    run_lorax("merge", run / "adapter", tmp_path / "merged", *plugin)
    model = lorax.load_model(folder / "base")
    lorax.load_adapter(model, run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (merged(IDS).logits - model(IDS)).abs().max() <= 1e-5


@pytest.mark.parametrize("command", [["verify"], ["inspect", "adapter"]])
def test_what_cannot_be_is_refused_by_name(command, run, monkeypatch, capfd):
    adapter = run / "adapter"
    code, said = failing(*command, adapter, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 4
    assert re.search("VeRA: verify does not know|is VERA: two vectors", said)


def test_without_the_plugin_it_is_refused_by_name(run, folder, base, monkeypatch, capfd):
    without_the_plugin(monkeypatch)
    with pytest.raises(AdapterError, match=r"peft_type 'VERA'; expected one of LORA.*--plugin"):
        lorax.load_adapter(base, run / "adapter")
    write_recipe(folder, [])
    code, said = failing(
        "train", folder / "recipe.toml", "--dry-run", monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 2
    assert "adapter.method = 'vera': expected one of" in said
    assert "plugin" in said


def test_a_recipe_refuses_what_it_does_not_take(folder, plugin):
    write_recipe(folder, [str(VERA)])
    with pytest.raises(lorax.LoraxError, match=r"adapter\.lora_alpha belongs to method"):
        lorax.Recipe.load(folder / "recipe.toml", {"adapter.lora_alpha": 3})
    with pytest.raises(lorax.LoraxError, match="lora_plus_ratio"):
        lorax.Recipe.load(folder / "recipe.toml", {"train.lora_plus_ratio": 16.0})
