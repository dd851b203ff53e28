"""S7: no command opens a socket over local files, and a token reaches no file and no screen."""

import json
import os
import subprocess
import sys

import pytest
from runs import make_folder, recipe

pytestmark = pytest.mark.slow

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"  # made up

# In a fresh interpreter: sockets are gone before lorax is imported. Each command runs to its end.
PROGRAM = """
import json, socket, sys

def refuse(*arguments, **names):
    raise AssertionError(f"a socket: {arguments} {names}")

asked = []
class Refused(socket.socket):
    def __init__(self, *arguments, **names):
        asked.append(arguments)
        refuse(*arguments, **names)

socket.socket = Refused
for name in ("getaddrinfo", "gethostbyname", "create_connection", "gethostbyname_ex"):
    setattr(socket, name, lambda *a, **n: (asked.append(a), refuse(*a, **n)))

from lorax import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lorax", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)
assert not asked, asked
print("all quiet")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("quiet"))


def commands(folder):
    run, model = str(folder / "run"), str(folder / "model")
    path = folder / "recipe.toml"
    path.write_text(recipe(folder, run, **{"train.max_steps": 2, "train.save_steps": 1}).to_toml())
    adapter = f"{run}/adapter"
    return [
        ["train", str(path)],
        ["train", str(path), "--resume"],
        ["generate", run, "say a", "--max-new-tokens", "4"],
        ["evaluate", run, "--data", str(folder / "rows.jsonl")],
        ["merge", adapter, str(folder / "merged")],
        ["quantize", model, str(folder / "quantized")],
        ["inspect", "adapter", adapter],
        ["inspect", "data", str(path)],
        ["inspect", "loss", str(path)],
        ["verify", adapter, "--tokens", "16"],
        ["verify", "--run", run, "--steps", "1"],
    ]


def test_no_socket_and_no_token_over_local_files(folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB")}
    environment |= {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands(folder))],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.endswith("all quiet\n")
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
