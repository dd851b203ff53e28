"""A path where nothing is: the same exit code, in one line that names it, in every command."""

import sys

import pytest
from tiny_tokenizer import byte_tokenizer

from lorax import cli
from lorax.formats.tokenizer_files import write_tokenizer

RECIPE = """[model]
path = "{model}"
[data]
path = "{data}"
[train]
output_dir = "run"
"""
COMMANDS = [
    "train gone/x.toml",
    "train gone/x.toml --dry-run",
    "train rows-gone.toml",
    "train model-gone.toml",
    "generate gone/x hi",
    "generate gone/x.gguf hi",
    "evaluate gone/x --data rows.jsonl",
    "merge gone/x out",
    "merge gone/x --report",
    "quantize gone/x out",
    "export gone/x out --format gguf",
    "verify gone/x",
    "inspect quantization gone/x",
    "inspect adapter gone/x",
    "inspect optimizer gone/x",
    "adapter add gone/x --output out",
    "demo --model gone/x --output-dir out",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from oracles import llama

    root = tmp_path_factory.mktemp("missing")
    tokenizer = byte_tokenizer()
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(root / "base")
    write_tokenizer(tokenizer, root / "base")
    (root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    (root / "rows-gone.toml").write_text(RECIPE.format(model="base", data="gone/x.jsonl"))
    (root / "model-gone.toml").write_text(RECIPE.format(model="gone/x", data="rows.jsonl"))
    (root / "good.toml").write_text(RECIPE.format(model="base", data="rows.jsonl"))
    return root


@pytest.fixture
def run(place, monkeypatch, capfd):
    def run_command(line: str) -> tuple[int, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["lorax", *line.split()])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capfd.readouterr().err

    return run_command


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_there(run, command):
    code, err = run(command)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 3, err
    assert len(errors) == 1
    assert "gone/x" in errors[0]
    assert "Traceback" not in err


def test_a_dry_run_looks_at_the_output_directory(run, place):
    """As the run itself would say, and only if it would."""
    assert run("train good.toml --dry-run")[0] == 0
    (place / "run").mkdir()
    (place / "run" / "config.toml").write_text("here")
    dry, real = run("train good.toml --dry-run"), run("train good.toml")
    (place / "run" / "config.toml").unlink()
    assert dry == real
    assert dry[0] == 2
    assert "not empty" in dry[1]


@pytest.mark.parametrize("line", ["train ~/good.toml --dry-run", "train ~/none.toml"])
def test_home_is_filled_in(run, place, monkeypatch, line):
    monkeypatch.setenv("HOME", str(place))
    code, err = run(line)
    assert code == (0 if "good" in line else 3)
    assert not err or str(place / "none.toml") in err
