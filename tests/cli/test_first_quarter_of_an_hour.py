"""README's six lines for a new user, run as they stand on a directory and rows that they bring."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hf_directories
import pytest
from command_line import complete_lorax
from hf_directories import Cell

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- quickstart -->\n```sh\n(.*?)```\n<!-- end -->", re.DOTALL)


def lines() -> list[str]:
    return BLOCK.search((ROOT / "README.md").read_text()).group(1).splitlines()


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """As in a shell of theirs, with the environment's programs in reach."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["/bin/bash", "-c", line],
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def run(line: str) -> subprocess.CompletedProcess[str]:
    """The first command in a shell; the others in this process, which has torch in it already."""
    program, *words = shlex.split(line)
    if words[0] == "train":
        return shell(line)
    if program == "lorax":
        return complete_lorax(*words)
    assert (program, words[0]) == ("python", "-c")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(words[1], {})  # noqa: S102 - README's own line
    return subprocess.CompletedProcess(line, 0, out.getvalue(), "")


def test_there_are_six_lines_and_the_first_one_installs():
    assert len(lines()) <= 6
    assert lines()[0].startswith("pip install .")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        Cell("llama", "GPT2Tokenizer", "transformers5"),
        pytest.param(Cell("gpt2", "GPT2Tokenizer", "old"), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_the_lines_run_as_they_stand(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_directories.build(cell, tmp_path / "my-model")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = [
        {"instruction": f"What is {n} and one?", "input": "", "output": f"It is {n + 1}."}
        for n in range(20)
    ]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    for line in lines()[1:]:
        done = run(line)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
    kind = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[cell.architecture]
    assert kind in done.stdout  # the last line shows the merged model
