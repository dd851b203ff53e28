"""A run that dies between saving what it trained and its last evaluation is completed."""

import json

import pytest
from runs import Killed, make_folder, recipe, same

import lorax
from lorax.training import finished, loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("last"))


def killed_in_last_evaluation(asked, monkeypatch, tail=b""):
    honest = loop.evaluate

    def dies(model, *rest):
        if asked_run.is_dir():
            raise Killed
        return honest(model, *rest)

    run = loop.RunDirectory(asked)
    asked_run = run.result
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", dies)
        with pytest.raises(Killed):
            lorax.train(asked)
    with run.metrics.open("ab") as file:
        file.write(tail)
    (run.path / "loss.png").unlink(missing_ok=True)
    return run


METHODS = {
    "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
    "dora": {"r": 2, "use_dora": True},
    "full": {"method": "full"},
}


HALF = b'{"step": 6, "eval_lo'


@pytest.mark.parametrize(
    ("method", "tail", "packing"),
    [
        ("lora", b"", False),
        ("lora", HALF, True),
        ("dora", HALF, False),
        ("full", b"", False),
    ],
)
def test_the_missing_line_is_made_up_for(folder, tmp_path, monkeypatch, method, tail, packing):
    more = {"data.packing": packing, "data.max_length": 32}
    lorax.train(recipe(folder, tmp_path / "whole", METHODS[method], **more))
    asked = recipe(folder, tmp_path / "run", METHODS[method], **more)
    run = killed_in_last_evaluation(asked, monkeypatch, tail)
    lines = lorax.train(asked, resume=True).metrics
    assert lines == [json.loads(x) for x in run.metrics.read_text().splitlines()]
    assert run.picture.is_file()
    same(tmp_path / "whole", run.path)


def test_a_finished_run_is_not_evaluated_again(folder, tmp_path, monkeypatch):
    asked = recipe(folder, tmp_path / "run")
    before = lorax.train(asked)
    monkeypatch.setattr(finished, "evaluate", None)
    assert lorax.train(asked, resume=True).metrics == before.metrics


def test_another_at_work_there_is_refused(folder, tmp_path, monkeypatch):
    asked = recipe(folder, tmp_path / "run")
    run = killed_in_last_evaluation(asked, monkeypatch)
    other = loop.RunDirectory(asked)
    other.lock()
    content = run.metrics.read_bytes()
    with pytest.raises(lorax.LoraxError, match="another run is at work"):
        lorax.train(asked, resume=True)
    assert run.metrics.read_bytes() == content
    other.release()
