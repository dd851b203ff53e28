"""`lorax serve` as a program: its line, its end, and what it says where it cannot begin."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import httpx2 as httpx
import pytest
from command_line import complete_lorax
from served import make_directories

ADAPTERS = {"plain": {"r": 4, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_directories(tmp_path_factory.mktemp("command"), ADAPTERS)


def test_one_line_when_it_is_ready_and_sigterm_drains(folder):
    command = [sys.executable, "-m", "lorax", "serve", folder / "base", "--port", "0"]
    command += ["--adapters", folder / "adapters", "--quantization", "nf4-dq"]
    environment = {**os.environ, "LORAX_API_KEY": "secret"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        line = process.stdout.readline()
        address = line.split()[-1]
        assert address.startswith("http://127.0.0.1:"), line
        asked = {"model": "plain", "prompt": "x", "max_tokens": 200, "stream": True}
        keyed = {"authorization": "Bearer secret"}
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            asking = client.stream("POST", "/v1/completions", json=asked, headers=keyed)
            with asking as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out, error) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--adapters", "nowhere"], 3, "nowhere"),
        (["--host", "256.0.0.1"], 3, "cannot listen on 256.0.0.1"),
        (["--timeout", "0"], 2, "timeout"),
        (["--quantization", "nf5"], 2, "nf5"),
        (["--slots", "0"], 2, "slots"),
    ],
)
def test_what_cannot_be_served_is_one_line(folder, options, code, words):
    done = complete_lorax("serve", folder / "base", "--port", "0", *options)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_packages_that_are_missing_are_named(folder, monkeypatch):
    command = sys.modules["lorax.cli.serve"]  # lorax.cli.serve is the function
    monkeypatch.setattr(
        command, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name)
    )
    done = complete_lorax("serve", folder / "base")
    assert done.returncode == 3
    assert "uvicorn" in done.stderr
    assert "lorax-finetuning[serve]" in done.stderr
