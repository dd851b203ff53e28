"""A run that was cut off goes on as if nothing had been: metrics and result bit for bit."""

import json

import pytest
import torch
from runs import KillAt, Killed, make_folder, recipe, same
from safetensors.torch import load_file

import lorax
from lorax.errors import AdapterError, FormatError, NumericalStop, RecipeError, UsageError
from lorax.training import loop, processes
from lorax.training.loop import Listener
from lorax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_picture")

ADALORA = {"method": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 2,
           "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
METHODS = {
    "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
    "dora": {"r": 4, "target_modules": "all-linear", "use_dora": True},
    "pissa": {"r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa"},
    "pissa_niter": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"},
    "loftq": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "loftq"},
    "whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "adalora": ADALORA,
    "prompt": {"method": "prompt-tuning", "num_virtual_tokens": 4},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    lorax.train(recipe(folder, output))
    return output


def cut_and_resumed(folder, output, step, adapter=None, **overrides):
    """The directory of a run that was killed behind `step`, and went on."""
    interrupted = recipe(folder, output, adapter, **overrides)
    with pytest.raises(Killed):
        lorax.train(interrupted, KillAt(step))
    torch.manual_seed(1234)  # nothing of the first process is left
    lorax.train(interrupted, resume=True)
    return output


def whole_and_cut(folder, tmp_path, step, adapter=None, **overrides):
    """The directories of an undisturbed run, and of one that was killed behind `step`."""
    lorax.train(recipe(folder, tmp_path / "whole", adapter, **overrides))
    return tmp_path / "whole", cut_and_resumed(folder, tmp_path / "cut", step, adapter, **overrides)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_for_bit(folder, tmp_path, method):
    same(*whole_and_cut(folder, tmp_path, 5, METHODS[method]))


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_every_optimizer_goes_on_bit_for_bit(folder, tmp_path, optimizer):
    overrides = {"train.optimizer": optimizer, "train.weight_decay": 0.1}
    same(*whole_and_cut(folder, tmp_path, 5, **overrides, **{"train.lora_plus_ratio": 4.0}))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
def test_wherever_it_was_cut(folder, undisturbed, tmp_path, step):
    """Before the first checkpoint, at one, behind one, and behind the last step."""
    same(undisturbed, cut_and_resumed(folder, tmp_path / "run", step))


@pytest.mark.parametrize("change", [{"model.quantization": "nf4-dq"}, {"model.dtype": "bfloat16"}])
def test_over_other_bases(folder, tmp_path, change):
    same(*whole_and_cut(folder, tmp_path, 5, **change))


def test_cut_in_the_middle_of_an_accumulation(folder, undisturbed, tmp_path, monkeypatch):
    calls, real = [], processes.summed_loss

    def loss(model, *batch):
        calls.append(model.training)
        if len(calls) == 12:  # the second micro-batch of the fifth step
            raise Killed
        return real(model, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "summed_loss", loss)
        with pytest.raises(Killed):
            lorax.train(recipe(folder, tmp_path / "cut"))
    lorax.train(recipe(folder, tmp_path / "cut"), resume=True)
    same(undisturbed, tmp_path / "cut")


def test_cut_three_times(folder, undisturbed, tmp_path):
    for resume, step in ((False, 3), (True, 4), (True, 5)):
        with pytest.raises(Killed):
            lorax.train(recipe(folder, tmp_path / "cut"), KillAt(step), resume=resume)
    lorax.train(recipe(folder, tmp_path / "cut"), resume=True)
    same(undisturbed, tmp_path / "cut")


def test_metrics_behind_the_checkpoint_are_cut_back_before_a_step_is_made(folder, tmp_path):
    """In the file and in the run: what was measured behind the checkpoint is measured again."""
    at_once = []

    class Look(Listener):
        def resumed(self, step, checkpoint):
            at_once.extend(read_metrics(tmp_path / "run" / "metrics.jsonl"))

    with pytest.raises(Killed):
        lorax.train(recipe(folder, tmp_path / "run"), KillAt(5))
    run = lorax.train(recipe(folder, tmp_path / "run"), Look(), resume=True)
    assert [line["step"] for line in at_once] == [0, 1, 2, 3, 4, 4]
    assert run.metrics == read_metrics(run.output_dir / "metrics.jsonl")
    assert [line["step"] for line in run.metrics if "loss" in line] == list(range(1, 7))


def test_a_finished_run_stays_as_it_is(folder, tmp_path):
    run = lorax.train(recipe(folder, tmp_path / "run"))
    files = {p: p.read_bytes() for p in run.output_dir.rglob("*") if p.is_file()}
    again = lorax.train(recipe(folder, tmp_path / "run"), resume=True)
    assert {p: p.read_bytes() for p in run.output_dir.rglob("*") if p.is_file()} == files
    assert again.metrics == run.metrics
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(again.model(ids), run.model(ids))


def test_resuming_what_is_not_there_begins_it(folder, undisturbed, tmp_path):
    lorax.train(recipe(folder, tmp_path / "new"), resume=True)
    same(undisturbed, tmp_path / "new")


def test_without_resume_the_directory_is_taken_and_the_message_says_how_to_go_on(folder, tmp_path):
    with pytest.raises(Killed):
        lorax.train(recipe(folder, tmp_path / "run"), KillAt(3))
    with pytest.raises(UsageError, match="--resume"):
        lorax.train(recipe(folder, tmp_path / "run"))


@pytest.mark.parametrize(
    "change", [{"train.learning_rate": 1e-3}, {"adapter.r": 8}, {"data.max_length": 100}]
)
def test_another_recipe_is_refused_by_its_key(folder, tmp_path, change):
    with pytest.raises(Killed):
        lorax.train(recipe(folder, tmp_path / "run"), KillAt(3))
    with pytest.raises(RecipeError, match=next(iter(change))):
        lorax.train(recipe(folder, tmp_path / "run", **change), resume=True)


def test_other_rows_are_refused(tmp_path):
    folder = make_folder(tmp_path)
    with pytest.raises(Killed):
        lorax.train(recipe(folder, tmp_path / "run"), KillAt(3))
    rows = (folder / "rows.jsonl").read_text().replace("bbb", "bba", 1)
    (folder / "rows.jsonl").write_text(rows)
    with pytest.raises(FormatError, match="rows"):
        lorax.train(recipe(folder, tmp_path / "run"), resume=True)


def test_a_checkpoint_is_a_peft_adapter_too(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with pytest.raises(Killed):
        lorax.train(recipe(folder, tmp_path / "run"), KillAt(5))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, checkpoint)
    mine = lorax.load_model(folder / "model")
    lorax.load_adapter(mine, checkpoint)
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(mine(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_keeps_the_newest(folder, tmp_path, keep):
    lorax.train(
        recipe(folder, tmp_path / "run", **{"train.keep_checkpoints": keep, "train.save_steps": 1})
    )
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (1, 2, 3, 4, 5)][-keep:]


def test_save_steps_of_zero_saves_nothing(folder, tmp_path):
    lorax.train(recipe(folder, tmp_path / "run", **{"train.save_steps": 0}))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def spoiled(monkeypatch):
    """A loss that is not a number in the steps given (each has three micro-batches).

    Gives the list of what torch's generator was before each micro-batch.
    """

    def spoil(*steps):
        generators, real = [], processes.summed_loss

        def loss(model, *batch):
            generators.append(torch.get_rng_state())
            value = real(model, *batch)
            return value * float("nan") if (len(generators) - 1) // 3 + 1 in steps else value

        monkeypatch.setattr(processes, "summed_loss", loss)
        return generators

    return spoil


def test_skip_leaves_the_weights_bit_equal(folder, tmp_path, spoiled):
    spoiled(4)
    off = {"train.eval_steps": None, "data.eval_fraction": 0.0, "train.save_steps": 1}
    off |= {"train.keep_checkpoints": None, "train.nan_policy": "skip"}
    run = lorax.train(recipe(folder, tmp_path / "run", **off))
    names = [run.output_dir / "checkpoints" / f"step-{step:08d}" for step in (3, 4, 5)]
    three, four, five = (load_file(name / "trained.safetensors") for name in names)
    assert all(torch.equal(three[key], four[key]) for key in three)
    assert not all(torch.equal(four[key], five[key]) for key in four)
    assert run.metrics[3]["loss"] == "nan"
    assert run.metrics[3]["not_finite"] == "skip"
    assert all(isinstance(line["loss"], float) for line in run.metrics[4:])


def test_rollback_takes_the_newest_checkpoint_and_goes_on_with_the_next_rows(
    folder, tmp_path, spoiled
):
    generators = spoiled(5)
    off = {"train.eval_steps": None, "data.eval_fraction": 0.0, "train.nan_policy": "rollback"}
    off |= {"train.save_steps": 3, "train.keep_checkpoints": None}
    at_the_nan = []

    class Look(Listener):
        def measured(self, line):
            if line["step"] == 5:
                at_the_nan.append(torch.get_rng_state())

    run = lorax.train(recipe(folder, tmp_path / "run", **off), Look())
    assert [line["step"] for line in run.metrics] == list(range(1, 7))
    assert torch.equal(generators[3 * 5], at_the_nan[0])  # the next dropout is drawn anew
    assert not torch.equal(generators[3 * 5], generators[3 * 3])  # as it was at the checkpoint
    assert run.metrics[4]["not_finite"] == "rollback"
    assert (run.output_dir / "checkpoints" / "step-00000000").is_dir()


def test_too_many_in_a_row_stop_the_run(folder, tmp_path, spoiled):
    spoiled(*range(1, 100))
    change = {"train.nan_policy": "skip", "train.max_steps": 30, "data.eval_fraction": 0.0}
    with pytest.raises(NumericalStop):
        lorax.train(recipe(folder, tmp_path / "run", **change))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == loop.MAX_NOT_FINITE


@pytest.mark.parametrize(
    ("key", "value"), [("early_stopping_patience", 2), ("nan_policy", "rollback")]
)
def test_adalora_refuses_what_would_leave_its_steps(folder, tmp_path, key, value):
    with pytest.raises((RecipeError, AdapterError), match=key):
        recipe(folder, tmp_path / "run", ADALORA, **{f"train.{key}": value})


def test_early_stopping_keeps_the_best(folder, tmp_path):
    change = {"train.early_stopping_patience": 2, "train.eval_steps": 1, "train.max_steps": 60}
    change |= {"train.learning_rate": 0.1, "train.lr_scheduler": "constant"}
    run = lorax.train(recipe(folder, tmp_path / "run", **change))
    evaluations = [line for line in run.metrics if "eval_loss" in line and line["step"]]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    assert evaluations[-1]["step"] == best["step"] + 2 < 60
    found = loop.evaluate(run.model, loop.prepare(
        recipe(folder, tmp_path / "other", **change))[2].eval_rows, 3, 0)  # fmt: skip
    assert found["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)


def test_early_stopping_goes_on_bit_for_bit(folder, tmp_path):
    change = {"train.early_stopping_patience": 3, "train.eval_steps": 1, "train.max_steps": 40}
    change |= {"train.learning_rate": 0.1, "train.save_steps": 2}
    same(*whole_and_cut(folder, tmp_path, 5, **change))


def test_early_stopping_without_rows_to_evaluate_on_is_refused(folder, tmp_path):
    change = {"train.early_stopping_patience": 3, "data.eval_fraction": 0.0}
    with pytest.raises(RecipeError, match="early_stopping_patience"):
        recipe(folder, tmp_path / "run", **change)


def test_the_manifest_says_what_design_says(folder, tmp_path):
    lorax.train(recipe(folder, tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert set(manifest) >= {"step", "files", "versions"}
    assert {p.name for p in checkpoint.iterdir()} == {*manifest["files"], "manifest.json"}
    assert all(set(entry) == {"bytes", "sha256"} for entry in manifest["files"].values())
