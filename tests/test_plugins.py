"""A user's own file: executed once, by whatever command names it; what fails is one line."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from command_line import run_lorax
from safetensors.torch import load_file
from tiny_runs import folder, recipe  # noqa: F401 - a fixture

import lorax
from lorax import cli
from lorax.errors import EnvironmentProblem, PluginError
from lorax.quant import codebooks

HOOKS = Path(__file__).parent / "plugins" / "hooks.py"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("x = 1\nraise ValueError('no\\nway')\n", r"line 2: ValueError: no way"),
        ("def f(:\n", r"line 1: SyntaxError"),
        ("import no_such_package\n", r"line 1: ModuleNotFoundError"),
        ("import lorax\nlorax.register_codebook('nf4', range(16))\n", r"codebook 'nf4'"),
        ("import lorax\nlorax.register_variant(lorax.Variant('lora', None, 'L', str))\n",
         r"variant 'lora' is there already"),
        ("import lorax\nlorax.register_variant(lorax.Variant('mine', None, 'L', str))\n",
         r"variant 'mine' has no config"),
    ],
)  # fmt: skip
def test_a_plugin_that_fails_is_one_line(text, word, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(PluginError, match=rf"mine\.py: {word}") as caught:
        lorax.load_plugin(tmp_path / "mine.py")
    assert "\n" not in str(caught.value)
    assert not [name for name in set(sys.modules) - before if name.endswith("_mine")]


def test_what_is_no_plugin(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"nothing\.py"):
        lorax.load_plugin(tmp_path / "nothing.py")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(PluginError, match="expected a Python file"):
        lorax.load_plugin(tmp_path / "mine.txt")
    with pytest.raises(PluginError, match="expected a Python file"):
        lorax.load_plugin(tmp_path)


def test_a_plugin_is_executed_once(tmp_path):
    (tmp_path / "count.py").write_text(
        "import sys\nsys.lorax_count = vars(sys).get('lorax_count', 0) + 1\n"
    )
    assert lorax.load_plugin(tmp_path / "count.py") is lorax.load_plugin(str(tmp_path / "count.py"))
    assert vars(sys).pop("lorax_count") == 1


def test_plugin_stands_anywhere_in_a_command(folder, tmp_path, monkeypatch):  # noqa: F811
    values = "[(2 * code - 15) / 15 for code in range(16)]"
    (tmp_path / "sym.py").write_text(
        f"import lorax\nlorax.register_codebook('symtest', {values})\n"
    )
    monkeypatch.setattr(codebooks, "CODEBOOKS", dict(codebooks.CODEBOOKS))
    said = run_lorax("--plugin", tmp_path / "sym.py", "inspect", "quantization", folder / "model",
                     "--format", "symtest")  # fmt: skip
    assert "symtest" in said


def test_plugin_without_a_file_is_a_usage_error(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["lorax", "train", "x.toml", "--plugin"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "expected a Python file" in capfd.readouterr().err


def test_paths_are_relative_to_the_recipe_and_absolute_in_the_run(folder, tmp_path):  # noqa: F811
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "empty.py").write_text("")
    values = recipe(folder, tmp_path / "run").model_dump(exclude_none=True)
    (tmp_path / "sub" / "r.toml").write_text(tomli_w.dumps({**values, "plugins": ["empty.py"]}))
    found = lorax.Recipe.load(tmp_path / "sub" / "r.toml", plugins=[HOOKS])
    assert found.plugins == [str(tmp_path / "sub" / "empty.py"), str(HOOKS)]
    assert lorax.Recipe.from_dict(tomllib.loads(found.to_toml())) == found


def test_a_run_s_own_plugins_are_not_executed_to_compare_recipes(folder, tmp_path):  # noqa: F811
    """Only what the user names is: not what lies in a directory that a run would go on in."""
    there = recipe(folder, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "evil.py").write_text("raise SystemError('executed')\n")
    stated = tomli_w.dumps({**there.model_dump(exclude_none=True), "plugins": ["../evil.py"]})
    (tmp_path / "run" / "config.toml").write_text(stated)
    with pytest.raises(lorax.LoraxError, match="another recipe: plugins is"):
        lorax.train(there, resume=True)


def test_a_hook_from_a_plugin_writes_and_survives_a_resume(folder, tmp_path):  # noqa: F811
    lorax.load_plugin(HOOKS)
    runs = {}
    for name in ("whole", "cut"):
        changes = {"train.hooks": ["log-norms"], "train.max_steps": 4, "train.save_steps": 2}
        made = recipe(folder, tmp_path / name, **changes)

        class Stop(lorax.StepHook):
            steps = 0

            def after_step(self):
                self.steps += 1
                if self.steps == 3:
                    raise KeyboardInterrupt
                return {}

        if name == "cut":
            with pytest.raises(KeyboardInterrupt):
                lorax.train(made, hooks=[Stop()])
        lorax.train(made, resume=name == "cut")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        runs[name] = [(line["norm"], line["mean_norm"]) for line in lines if "norm" in line]
    assert len(runs["whole"]) == 4
    assert runs["whole"] == runs["cut"]
    kept = tmp_path / "whole" / "checkpoints" / "step-00000002" / "hook.safetensors"
    assert list(load_file(kept)) == ["log-norms/total"]


def test_an_unknown_or_doubled_hook_is_named(folder, tmp_path):  # noqa: F811
    lorax.load_plugin(HOOKS)
    for names, word in ((["no-such"], "'no-such' is unknown"), (["log-norms"] * 2, "twice")):
        with pytest.raises(lorax.LoraxError, match=word):
            recipe(folder, tmp_path, **{"train.hooks": names})


def test_a_penalty_of_two_hooks_is_their_sum():
    import torch

    from lorax.training.hooks import SeveralHooks, StepHook

    class Penalty(StepHook):
        def __init__(self, value):
            self.value = torch.tensor(value)

        def penalty(self):
            return self.value

    hooks = SeveralHooks({"a": Penalty(1.0), "b": StepHook(), "c": Penalty(2.5)})
    assert hooks.penalty().item() == 3.5
    assert SeveralHooks({"b": StepHook()}).penalty() is None
