"""Every writer where a file may not grow: one line, exit code 3, nothing half written.

RLIMIT_FSIZE makes a write fail as a full disk does (EFBIG for ENOSPC), in this process.
"""

import contextlib
import io
import resource
import sys
from unittest import mock

import pytest
from command_line import run_lorax
from runs import make_folder, recipe

import lorax
from lorax import cli
from lorax.errors import EnvironmentProblem


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("full"))
    settings = {"train.max_steps": 1, "data.eval_fraction": 0.0}
    lorax.train(recipe(folder, folder / "run", {"r": 4}, **settings))
    return folder


@contextlib.contextmanager
def room(size):
    """No file may grow over so many bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def refused(*arguments, size):
    """The one line of a command that must end with exit code 3."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lorax", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        room(size),
        pytest.raises(SystemExit) as stop,
    ):
        cli.main()
    assert stop.value.code == 3, (stop.value.code, err.getvalue(), out.getvalue())
    assert "Traceback" not in err.getvalue()
    lines = [x for x in err.getvalue().splitlines() if x.startswith("error:")]
    assert len(lines) == 1, err.getvalue()
    return lines[0]


def seen(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


COMMANDS = {
    "merge": (["merge", "run/adapter", "OUT"], 3000),
    "quantize": (["quantize", "model", "OUT"], 3000),
    "verify --html": (["verify", "run/adapter", "--tokens", "16", "--html", "OUT"], 3000),
    "merge --report": (["merge", "run/adapter", "OUT", "--report", "--tokens", "16"], 3000),
    "verify --run --html": (["verify", "--run", "run", "--html", "OUT"], 40_000),
    "export": (["export", "run/adapter", "OUT", "--format", "gguf-adapter"], 3000),
    "adapter add": (["adapter", "add", "run/adapter", "--weights", "1", "--output", "OUT"], 300),
    "inspect quantization": (["inspect", "quantization", "model", "--plot", "OUT"], 3000),
    "inspect data --html": (["inspect", "data", "run/config.toml", "--html", "OUT"], 300),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_one_line_and_leaves_nothing(folder, tmp_path, name):
    arguments, size = COMMANDS[name]
    out = tmp_path / "out"
    paths = {"OUT": out, "model": folder / "model", "run/adapter": folder / "run/adapter",
             "run/config.toml": folder / "run/config.toml",
             "run": folder / "run"}  # fmt: skip
    before = seen(folder)
    said = refused(*(paths.get(a, a) for a in arguments), size=size)
    assert str(tmp_path) in said
    assert seen(folder) == before
    assert not list(tmp_path.iterdir()), "something is left"


def test_save_model_and_save_adapter_leave_what_was_there(folder, tmp_path):
    model = lorax.load_model(folder / "model")
    lorax.load_adapter(model, folder / "run/adapter")
    lorax.save_adapter(model, tmp_path / "adapter")
    before = seen(tmp_path)
    with room(2000), pytest.raises(EnvironmentProblem):
        lorax.save_adapter(model, tmp_path / "adapter")
    assert seen(tmp_path) == before
    model = lorax.load_model(folder / "model")
    with room(2000), pytest.raises(EnvironmentProblem):
        lorax.save_model(model, tmp_path / "model")
    assert seen(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("size", [100, 700, 5000])
def test_a_run_is_one_line_at_its_recipe_its_metrics_and_its_adapter(folder, tmp_path, size):
    path = tmp_path / "recipe.toml"
    changes = {"train.save_steps": 0, "data.eval_fraction": 0.0, "train.max_steps": 3}
    path.write_text(recipe(folder, tmp_path / "run", {"r": 8}, **changes).to_toml())
    said = refused("train", path, size=size)
    assert str(tmp_path / "run") in said
    assert not (tmp_path / "run/adapter").exists()
    assert not list(tmp_path.rglob(".tmp-*"))
    run_lorax("train", path, "--resume")  # with room again, it goes on
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
