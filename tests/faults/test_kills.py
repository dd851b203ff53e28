"""Real processes that are killed, stopped, or run out of disk; and two that want one directory."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from runs import make_folder, recipe, same

import lorax
from lorax.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LORAX_KILLS", "6"))  # `make nightly` asks for 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


def start(folder, output, *more, limit=None, **overrides):
    """`lorax train` in a process of its own."""
    overrides = {
        "train.max_steps": 60,
        "train.save_steps": 5,
        "data.eval_fraction": 0.0,
    } | overrides
    path = folder / f"{output.name}.toml"
    path.write_text(recipe(folder, output, **overrides).to_toml())

    def before():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "lorax", "train", str(path), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=before, **pipes)


def wait_for_step(output, step, process, seconds=120):
    """Until metrics.jsonl has that step."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        if len(lines) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {seconds} s")


def finish(process):
    text = process.communicate(timeout=240)[0]
    return process.returncode, text


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    code, text = finish(start(folder, output))
    assert code == 0, text
    return output


def test_killed_at_random_moments(folder, undisturbed, tmp_path):
    rng, output = random.Random(0), tmp_path / "run"
    for _ in range(KILLS):
        process = start(folder, output, "--resume")
        done = (
            len((output / "metrics.jsonl").read_text().splitlines())
            if (output / "metrics.jsonl").is_file()
            else 0
        )
        wait_for_step(output, max(1, min(55, done - 4)), process)
        time.sleep(rng.random() * 0.25)
        process.send_signal(signal.SIGKILL)
        finish(process)
    code, text = finish(start(folder, output, "--resume"))
    assert code == 0, text
    same(undisturbed, output)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(folder, undisturbed, tmp_path, number, expected):
    output = tmp_path / "run"
    process = start(folder, output)
    wait_for_step(output, 7, process)
    process.send_signal(number)
    code, text = finish(process)
    assert code == expected
    assert "--resume" in text
    assert "Traceback" not in text
    step = int(newest_checkpoint(output / "checkpoints").name[5:])
    assert len((output / "metrics.jsonl").read_text().splitlines()) == step
    code, text = finish(start(folder, output, "--resume"))
    assert code == 0, text
    same(undisturbed, output)


def test_sigusr1_saves_and_goes_on(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(folder, output, **{"train.save_steps": 0})
    wait_for_step(output, 7, process)
    process.send_signal(signal.SIGUSR1)
    code, text = finish(process)
    assert code == 0, text
    assert newest_checkpoint(output / "checkpoints") is not None
    same(undisturbed, output)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(folder, undisturbed, tmp_path):
    """The limit lets files grow to some kB: metrics.jsonl meets it behind the first checkpoints."""
    output = tmp_path / "run"
    biggest = max(p.stat().st_size for p in (undisturbed / "checkpoints").rglob("*"))
    process = start(folder, output, limit=biggest + 1, **{"train.max_steps": 5000})
    code, text = finish(process)
    assert code == 3, text
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if line.startswith("error:")]) == 1
    assert newest_checkpoint(output / "checkpoints") is not None
    litter = [p.name for p in output.rglob(".tmp-*")]
    assert not litter


def test_no_room_for_the_first_checkpoint(folder, tmp_path):
    output = tmp_path / "run"
    code, text = finish(start(folder, output, limit=6000))
    assert code == 3, text
    assert "Traceback" not in text
    assert newest_checkpoint(output / "checkpoints") is None
    assert not list(output.rglob(".tmp-*"))


def test_a_second_run_in_the_directory_is_refused(folder, tmp_path):
    output = tmp_path / "run"
    first = start(folder, output, **{"train.max_steps": 2000})
    wait_for_step(output, 3, first)
    second = start(folder, output, "--resume", **{"train.max_steps": 2000})
    code, text = finish(second)
    assert code == 3, text
    assert "another run" in text
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 143


def test_two_that_begin_together(folder, tmp_path):
    """One trains, the other is refused; nothing of the first is lost."""
    output = tmp_path / "run"
    both = [start(folder, output), start(folder, output)]
    codes = sorted(finish(process)[0] for process in both)
    assert codes[0] == 0
    assert codes[1] in (2, 3)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    lorax.load_adapter(lorax.load_model(folder / "model"), output / "adapter")
