"""A run says what it will take, warns, and writes down what it took."""

import json

from command_line import complete_lorax
from tiny_runs import folder, recipe

from lorax.inspect.estimate import watch

__all__ = ["folder"]


def test_a_run_says_and_writes_down_its_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "free_bytes", lambda device: 1)
    monkeypatch.setenv("LORAX_ESTIMATE", "1")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(folder, tmp_path / "run", **{"train.max_steps": 1}).to_toml())
    done = complete_lorax("train", path)
    assert done.returncode == 0, done.stderr
    assert "memory   about" in done.stdout
    assert "likely be killed for memory" in done.stderr
    memory = json.loads((tmp_path / "run" / "environment.json").read_text())["memory"]
    assert memory["predicted_bytes"] > 0
    assert memory["peak_bytes"] > 10**8


def test_a_recipe_is_estimated(folder, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(folder, tmp_path / "run").to_toml())
    done = complete_lorax("estimate", path, "--adapter.r", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_bytes"] > 0
