"""What a new user copies: the recipes in configs/ and the code blocks in README.md run."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
README = (ROOT / "README.md").read_text()


def lorax(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "lorax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_resolves_and_its_head_tells_command_memory_and_time(path, tmp_path):
    head = path.read_text().split("[model]")[0]
    assert f"lorax train configs/{path.name}" in head
    assert "GB" in head
    result = lorax("train", str(path), "--dry-run", "--train.learning_rate", "1.25e-4")
    assert result.returncode == 0, result.stderr
    resolved = tomllib.loads(result.stdout.split("\n#")[0])
    assert resolved["train"]["learning_rate"] == 1.25e-4
    written = tomllib.loads(path.read_text())
    for section, values in written.items():
        for key, value in values.items():
            assert resolved[section][key] == value or key == "learning_rate"


def test_the_readme_shows_the_tree_that_is_there():
    block = re.search(r"```\n(lorax/ .*?)```", README, re.DOTALL).group(1)
    shown = set(re.findall(r"[\w/]+\.py", block))
    rooms = {line.split()[0] for line in block.splitlines() if re.match(r"  \w+/", line)}
    assert rooms == {f"{p.parent.name}/" for p in (ROOT / "lorax").glob("*/__init__.py")}
    here = {p.name for p in (ROOT / "lorax").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert shown == here


def test_the_readme_s_tables_are_made_from_the_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme_tables
    finally:
        sys.path.pop(0)
    assert "training_step" in re.findall(r"<!-- table: (\w+) -->", README)
    assert readme_tables.filled(README) == README


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_readme_s_python_runs(tmp_path, smollm2_gguf):
    """One after the other in one program, with the GGUF file in the place of the Hub's name."""
    code = "\n".join(blocks("python"))
    assert code.count('"HuggingFaceTB/SmolLM2-135M-Instruct"') >= 1
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2_gguf)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_readme_s_commands_exist():
    """Each lorax command that it shows is one, with the options that it is shown with."""
    commands = [
        line.split("#")[0].split()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("lorax ")
    ]
    assert {c[1] for c in commands} >= {"train", "generate", "evaluate", "merge", "demo"}
    for command in commands:
        words = command[1:3] if command[1] in ("inspect", "adapter") else command[1:2]
        help_text = lorax(*words, "--help")
        assert help_text.returncode == 0
        for option in re.findall(r"--[\w.-]+", " ".join(command[2:])):
            assert option in help_text.stdout or re.match(r"--\w+\.\w+", option), command
