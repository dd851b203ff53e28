"""Callbacks: plain functions behind each line, which change no number and lose no adapter."""

import pytest
import torch
from runs import make_folder, recipe, same

import lorax
from lorax.errors import PluginError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("callbacks"))


@pytest.fixture(scope="module")
def undisturbed(folder):
    return lorax.train(recipe(folder, folder / "undisturbed")).output_dir


def test_a_function_sees_each_line_and_the_model(folder, tmp_path):
    seen = []

    def look(line, model):
        norm = sum(p.norm().item() for n, p in model.named_parameters() if "lora_B" in n)
        seen.append((line, norm))

    run = lorax.train(recipe(folder, tmp_path / "run"), callbacks=[look])
    assert [line for line, _ in seen] == run.metrics
    norms = [norm for line, norm in seen if "loss" in line]
    assert 0 < norms[0] < norms[-1]


def meddle(line, model):
    """All that a careless function does, short of changing a parameter."""
    line.clear()
    model.eval()
    torch.manual_seed(7)
    torch.rand(100)


def sample(line, model):
    model.eval()
    ids = torch.randint(0, 200, (1, 5))
    assert not model(ids).requires_grad


def test_a_run_with_callbacks_is_the_run_without(folder, undisturbed, tmp_path):
    lorax.train(recipe(folder, tmp_path / "run"), callbacks=[meddle, sample])
    same(undisturbed, tmp_path / "run")


def test_one_that_returns_true_ends_the_run_behind_its_step(folder, tmp_path):
    run = lorax.train(
        recipe(folder, tmp_path / "run"), callbacks=[lambda line, model: line["step"] == 4]
    )
    assert [x["step"] for x in run.metrics if "loss" in x] == [1, 2, 3, 4]
    assert [x["step"] for x in run.metrics if "eval_loss" in x] == [0, 4]  # once, though due twice
    lorax.load_adapter(lorax.load_model(folder / "model"), run.result)
    again = lorax.train(recipe(folder, tmp_path / "run"), resume=True)
    assert again.metrics == run.metrics


class Failing:
    def __init__(self, step):
        self.step = step

    def __call__(self, line, model):
        if line["step"] == self.step:
            raise KeyError("a name that\nis not there")


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_one_that_raises_costs_no_step(folder, undisturbed, tmp_path, step):
    asked = recipe(folder, tmp_path / "run", **{"train.save_steps": 0})
    with pytest.raises(PluginError, match=f"callback Failing failed at step {step} ") as caught:
        lorax.train(asked, callbacks=[Failing(step)])
    assert "test_callbacks.py:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    saved = max(1, step)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{saved:08d}"]
    lorax.train(asked, resume=True)
    same(undisturbed, tmp_path / "run")


def test_one_that_raises_in_the_last_step_leaves_a_finished_run(folder, undisturbed, tmp_path):
    with pytest.raises(PluginError, match="failed at step 6"):
        lorax.train(recipe(folder, tmp_path / "run"), callbacks=[Failing(6)])
    same(undisturbed, tmp_path / "run")


def test_what_is_no_function_is_refused_before_anything(folder, tmp_path):
    with pytest.raises(UsageError, match="expected functions of"):
        lorax.train(recipe(folder, tmp_path / "run"), callbacks=["print"])
    assert not (tmp_path / "run").exists()
