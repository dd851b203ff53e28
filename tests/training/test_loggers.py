"""Other programs' logs: what TensorBoard reads back, what trackio is given, and runs that go on."""

import json
import logging
import sys
import types
from collections import defaultdict

import pytest
from runs import KillAt, Killed, make_folder, recipe

import lorax
from lorax.errors import EnvironmentProblem
from lorax.training import loggers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("loggers"))


def scalars(run):
    """{name: [(step, value)]} by TensorBoard's own reader of event files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = defaultdict(list)
    for file in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag].append((event.step, value.tensor.float_val[0]))
    return dict(found)


def numbers(run):
    """The same of metrics.jsonl, which is the record."""
    found = defaultdict(list)
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in line.items():
            if name != "step":
                found[name].append((line["step"], pytest.approx(value, rel=1e-6)))
    return dict(found)


def test_tensorboard_reads_back_the_numbers_of_metrics(folder, tmp_path):
    lorax.train(recipe(folder, tmp_path / "run", **{"train.loggers": ["tensorboard"]}))
    found = scalars(tmp_path / "run")
    assert found == numbers(tmp_path / "run")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["eval_loss"]] == [0, 4, 6]


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_run_that_goes_on_has_each_step_once_in_tensorboard(folder, tmp_path, killed_at):
    """Killed behind step 5, whose line TensorBoard has already; the checkpoint is of step 4."""
    asked = recipe(folder, tmp_path / "run", **{"train.loggers": ["tensorboard"]})
    with pytest.raises(Killed):
        lorax.train(asked, KillAt(killed_at))
    assert scalars(tmp_path / "run")["loss"][-1][0] == killed_at
    lorax.train(asked, resume=True)
    assert scalars(tmp_path / "run") == numbers(tmp_path / "run")


def test_a_logger_may_be_added_where_a_run_goes_on(folder, tmp_path):
    with pytest.raises(Killed):
        lorax.train(recipe(folder, tmp_path / "run"), KillAt(3))
    asked = recipe(folder, tmp_path / "run", **{"train.loggers": ["tensorboard"]})
    lorax.train(asked, resume=True)
    assert scalars(tmp_path / "run") == numbers(tmp_path / "run")


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_logger_that_is_not_installed_is_one_line_with_the_command(
    folder, tmp_path, monkeypatch, name
):
    honest = loggers.importlib.util.find_spec
    monkeypatch.setattr(
        loggers.importlib.util, "find_spec", lambda n: None if n == name else honest(n)
    )
    with pytest.raises(EnvironmentProblem, match=f"pip install {name}") as caught:
        lorax.train(recipe(folder, tmp_path / "run", **{"train.loggers": [name]}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class FakeTrackio(types.ModuleType):
    """trackio 0.43's functions that lorax calls: its install brings a web server of 60 MB."""

    def __init__(self):
        super().__init__("trackio")
        self.__spec__ = types.SimpleNamespace(name="trackio")
        self.runs, self.current, self.fails_at = [], None, None

    def Api(self):  # noqa: N802 - trackio's name
        found = [types.SimpleNamespace(name=r["name"], delete=lambda r=r: self.runs.remove(r))
                 for r in self.runs]  # fmt: skip
        return types.SimpleNamespace(runs=lambda project: found)

    def init(self, *, project, name, resume, embed, auto_log_gpu, auto_log_cpu):
        assert (project, resume, embed) == ("lorax", "never", False)
        assert not auto_log_gpu
        assert not auto_log_cpu
        print("* Trackio project initialized")
        self.current = {"name": name, "lines": [], "finished": False}
        self.runs.append(self.current)

    def log(self, metrics, step):
        if step == self.fails_at:
            raise OSError("no room\nfor it")
        self.current["lines"].append((step, metrics))

    def finish(self):
        self.current["finished"] = True


@pytest.fixture
def trackio(monkeypatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return fake


def test_trackio_gets_each_line_once_over_a_kill(folder, tmp_path, trackio, capsys):
    asked = recipe(folder, tmp_path / "run", **{"train.loggers": ["trackio"]})
    with pytest.raises(Killed):
        lorax.train(asked, KillAt(5))
    lorax.train(asked, resume=True)
    (run,) = trackio.runs
    assert run["finished"]
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert run["lines"] == [(x.pop("step"), x) for x in lines]
    assert "Trackio" not in capsys.readouterr().out


@pytest.mark.parametrize("step", [0, 3])
def test_a_logger_that_fails_is_a_warning_and_the_run_goes_on(
    folder, tmp_path, trackio, caplog, step
):
    trackio.fails_at = step
    with caplog.at_level(logging.WARNING, "lorax"):
        run = lorax.train(
            recipe(folder, tmp_path / "run", **{"train.loggers": ["trackio", "tensorboard"]})
        )
    (said,) = [r.getMessage() for r in caplog.records]
    assert said == "trackio failed, and the run goes on without it: no room for it"
    assert (run.result / "adapter_model.safetensors").is_file()
    assert scalars(tmp_path / "run") == numbers(tmp_path / "run")
