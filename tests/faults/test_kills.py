"""Real processes that are killed, stopped, or run out of disk; and two that want one directory.

Each process is a fork of one that has imported what a run needs: that is most of what a start
costs. What it then does is `lorax train`, from its arguments to its exit code.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest
from runs import make_folder, recipe, same

import lorax
from lorax.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LORAX_KILLS", "6"))  # `make nightly` asks for 50
STEPS = 30
forks = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    forks.set_forkserver_preload(["lorax.cli", "lorax.training.loop", "lorax.training.metrics"])
    return make_folder(tmp_path_factory.mktemp("tiny"))


def run_command(arguments, said, limit):
    """In the new process: `lorax` with these arguments; what it says goes into the pipe `said`."""
    from lorax import cli
    from lorax.training import loop

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    said.close()
    loop.draw_loss = lambda lines, path, warn: None  # it takes longer than the steps
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does where it starts by itself
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["lorax", *arguments]
    cli.main()


class Command:
    """`lorax train` in a process of its own."""

    def __init__(self, folder, output, *more, limit=None, **overrides):
        changes = {
            "train.max_steps": STEPS,
            "train.save_steps": 4,
            "train.eval_steps": None,
            "data.eval_fraction": 0.0,
        }
        path = folder / f"{output.name}.toml"
        path.write_text(recipe(folder, output, **changes | overrides).to_toml())
        self.output = output
        self.said, other_end = forks.Pipe(duplex=False)
        arguments = (["train", str(path), *more], other_end, limit)
        self.process = forks.Process(target=run_command, args=arguments)
        self.process.start()
        other_end.close()

    def send(self, number):
        os.kill(self.process.pid, number)

    def finish(self):
        """Its exit code, and what it said."""
        with os.fdopen(os.dup(self.said.fileno())) as pipe:
            text = pipe.read()  # to the end, which is that of the process
        self.process.join(60)
        return self.process.exitcode, text

    def wait_for_step(self, step, seconds=120):
        """Until metrics.jsonl has that step."""
        deadline = time.time() + seconds
        while lines_of(self.output) < step:
            assert self.process.is_alive(), self.finish()
            assert time.time() < deadline, f"no step {step} within {seconds} s"
            time.sleep(0.005)


def lines_of(output):
    path = output / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def resumed(folder, output):
    """Go on to the end."""
    code, text = Command(folder, output, "--resume").finish()
    assert code == 0, text


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    code, text = Command(folder, output).finish()
    assert code == 0, text
    return output


def test_killed_at_random_moments(folder, undisturbed, tmp_path):
    rng, output = random.Random(0), tmp_path / "run"
    for _ in range(KILLS):
        done = lines_of(output)
        command = Command(folder, output, "--resume")
        command.wait_for_step(max(1, min(STEPS - 5, done - 3)))
        time.sleep(rng.random() * 0.15)
        command.send(signal.SIGKILL)
        command.finish()
    resumed(folder, output)
    same(undisturbed, output)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(folder, undisturbed, tmp_path, number, expected):
    output = tmp_path / "run"
    command = Command(folder, output)
    command.wait_for_step(7)
    command.send(number)
    code, text = command.finish()
    assert code == expected, text
    assert "--resume" in text
    assert "Traceback" not in text
    step = int(newest_checkpoint(output / "checkpoints").name[5:])
    assert lines_of(output) == step
    resumed(folder, output)
    same(undisturbed, output)


def test_sigusr1_saves_and_goes_on(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    command = Command(folder, output, **{"train.save_steps": 0})
    command.wait_for_step(7)
    command.send(signal.SIGUSR1)
    code, text = command.finish()
    assert code == 0, text
    assert newest_checkpoint(output / "checkpoints") is not None
    same(undisturbed, output)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(folder, tmp_path):
    """A file may grow to what a checkpoint needs: metrics.jsonl meets that limit some steps on."""
    output = tmp_path / "run"
    small = {"adapter.r": 1, "adapter.target_modules": ["q_proj"], "train.max_steps": 5000}
    code, text = Command(folder, output, limit=6000, **small).finish()
    assert code == 3, text
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if line.startswith("error:")]) == 1
    assert "metrics.jsonl" in text
    assert newest_checkpoint(output / "checkpoints") is not None
    assert not list(output.rglob(".tmp-*"))


def test_no_room_for_the_first_checkpoint(folder, tmp_path):
    output = tmp_path / "run"
    code, text = Command(folder, output, limit=6000).finish()
    assert code == 3, text
    assert "Traceback" not in text
    assert newest_checkpoint(output / "checkpoints") is None
    assert not list(output.rglob(".tmp-*"))


def test_a_second_run_in_the_directory_is_refused(folder, tmp_path):
    output = tmp_path / "run"
    first = Command(folder, output, **{"train.max_steps": 2000})
    first.wait_for_step(3)
    code, text = Command(folder, output, "--resume", **{"train.max_steps": 2000}).finish()
    assert code == 3, text
    assert "another run" in text
    first.send(signal.SIGTERM)
    assert first.finish()[0] == 143


def test_two_that_begin_together(folder, tmp_path):
    """One trains, the other is refused; nothing of the first is lost."""
    output = tmp_path / "run"
    both = [Command(folder, output), Command(folder, output)]
    codes = sorted(command.finish()[0] for command in both)
    assert codes[0] == 0
    assert codes[1] in (2, 3)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    lorax.load_adapter(lorax.load_model(folder / "model"), output / "adapter")
