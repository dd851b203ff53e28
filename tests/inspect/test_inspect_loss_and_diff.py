"""`lorax inspect loss`: a step is one number however it is cut. `inspect diff`: where runs part."""

import json

import pytest
import torch
from command_line import run_lorax
from runs import KillAt, Killed, make_folder, recipe

import lorax
from lorax.inspect import loss as report
from lorax.inspect.runs import compare_runs
from lorax.training import loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("change", [{}, {"model.quantization": "nf4-dq"}])
def test_a_step_is_the_same_however_it_is_cut(folder, tmp_path, change):
    found = report.inspect_loss(recipe(folder, tmp_path / "run", **change))
    assert found.holds, found
    assert len(found.ways) >= 5
    assert max(way.loss_gap for way in found.ways) < 1e-6


def test_a_mean_of_means_is_found(folder, tmp_path, monkeypatch):
    real = report.summed_loss

    def mean(model, ids, labels, documents=None):
        count = (labels[:, 1:] != -100).sum()
        return real(model, ids, labels, documents) / count * 10

    monkeypatch.setattr(report, "summed_loss", mean)
    assert not report.inspect_loss(recipe(folder, tmp_path / "run")).holds


def test_the_loss_command(folder, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(folder, tmp_path / "run").to_toml())
    assert json.loads(run_lorax("inspect", "loss", path, "--json"))["holds"]


def runs(folder, tmp_path, **change):
    for name, more in (("a", {}), ("b", change)):
        lorax.train(recipe(folder, tmp_path / name, **{"train.digests": True}, **more))
    return compare_runs(tmp_path / "a", tmp_path / "b")


def test_equal_runs_are_equal(folder, tmp_path):
    found = runs(folder, tmp_path)
    assert found.holds
    assert found.steps == 6


@pytest.mark.parametrize(
    ("change", "step", "quantity"),
    [
        ({"train.learning_rate": 1e-3}, 1, "parameters"),
        ({"train.seed": 5}, 1, "batch"),
        ({"train.weight_decay": 0.5}, 1, "parameters"),
        ({"adapter.lora_alpha": 32}, 1, "gradients"),
    ],
)
def test_the_first_difference_is_named(folder, tmp_path, change, step, quantity):
    found = runs(folder, tmp_path, **change)
    assert (found.step, found.quantity) == (step, quantity)


def test_a_tensor_spoiled_in_one_step_is_named(folder, tmp_path, monkeypatch):
    lorax.train(recipe(folder, tmp_path / "a", **{"train.digests": True}))
    real, calls = loop._clip, [0]

    def clip(parameters, norm):
        calls[0] += 1
        if calls[0] == 4:
            parameters[3].grad.mul_(1 + 1e-6)
        return real(parameters, norm)

    monkeypatch.setattr(loop, "_clip", clip)
    lorax.train(recipe(folder, tmp_path / "b", **{"train.digests": True}))
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (found.step, found.quantity) == (4, "parameters")
    assert found.tensors


def test_a_resumed_run_has_the_digests_of_one_that_was_not_stopped(folder, tmp_path):
    lorax.train(recipe(folder, tmp_path / "a", **{"train.digests": True}))
    cut = recipe(folder, tmp_path / "b", **{"train.digests": True})
    with pytest.raises(Killed):
        lorax.train(cut, KillAt(5))
    torch.manual_seed(99)
    lorax.train(cut, resume=True)
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert found.holds
    assert found.steps == 6


def test_the_diff_command(folder, tmp_path):
    runs(folder, tmp_path, **{"train.learning_rate": 1e-3})
    out = run_lorax("inspect", "diff", tmp_path / "a", tmp_path / "b", code=1)
    assert "step 1" in out
    run_lorax("inspect", "diff", tmp_path / "a", tmp_path / "none", code=4)
