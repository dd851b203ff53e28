"""Signals inside a run, sent by the test to its own process; test_kills.py sends real ones."""

import signal

import pytest
import torch
from runs import make_folder, recipe, same

import lorax
from lorax.errors import EnvironmentProblem
from lorax.training.checkpoint import newest_checkpoint
from lorax.training.loop import Listener
from lorax.training.run_directory import RunDirectory
from lorax.training.signals import Interrupted, Signals

pytestmark = pytest.mark.usefixtures("no_picture")

STOPS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """As in a terminal: a shell that starts the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Send(Listener):
    """Sends signals behind the line of a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers, self.last = step, numbers, 0

    def measured(self, line):
        self.last = line["step"]
        if line["step"] == self.step and "loss" in line:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_ends_the_step_saves_and_the_run_goes_on(folder, tmp_path, number):
    short = {"train.max_steps": 4, "train.save_steps": 0}
    before = signal.getsignal(number)
    lorax.train(recipe(folder, tmp_path / "whole", **short))
    with pytest.raises(Interrupted, match=r"step 2 of 4 .*--resume") as caught:
        lorax.train(recipe(folder, tmp_path / "cut", **short), Send(2, number))
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints").name == "step-00000002"
    torch.manual_seed(1234)
    lorax.train(recipe(folder, tmp_path / "cut", **short), resume=True)
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", STOPS)
def test_a_second_stop_ends_the_run_at_once(folder, tmp_path, number):
    with pytest.raises(Interrupted, match="at once") as caught:
        lorax.train(recipe(folder, tmp_path / "run"), Send(2, number, number))
    assert caught.value.exit_code == 128 + number
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_sigusr1_saves_once_and_the_run_goes_on(folder, tmp_path):
    changes = {"train.max_steps": 4, "train.save_steps": 0, "train.keep_checkpoints": None}
    listener = Send(2, signal.SIGUSR1)
    lorax.train(recipe(folder, tmp_path / "run", **changes), listener)
    assert listener.last == 4
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_a_shell_ignores_for_its_background_jobs_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
        assert signals.stop is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_run_in_the_directory_is_refused_until_the_first_is_done(folder, tmp_path):
    settings = recipe(folder, tmp_path / "run")
    first, second = RunDirectory(settings), RunDirectory(settings)
    first.begin(settings, resume=False)
    with pytest.raises(EnvironmentProblem, match="another run"):
        second.begin(settings, resume=True)
    first.release()
    second.begin(settings, resume=True)
    second.release()
