"""The training loop on a tiny model: what it writes, what it depends on, what it refuses."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import folder as folder
from tiny_runs import recipe

import lorax
from lorax.data.batches import micro_batches
from lorax.errors import NumericalStop, RecipeError, UsageError
from lorax.models import Model
from lorax.training.evaluate import evaluate
from lorax.training.loop import Listener, prepare
from lorax.training.loss import head_loss, summed_loss

LINE = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds"]


def without_times(metrics):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def test_a_run_leaves_what_design_says(folder, tmp_path):
    run = lorax.train(recipe(folder, tmp_path / "run"))
    assert sorted(p.name for p in run.output_dir.iterdir()) == [
        "adapter",
        "config.toml",
        "environment.json",
        "loss.png",
        "metrics.jsonl",
    ]
    lines = [json.loads(x) for x in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.metrics
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert all(list(line) == LINE for line in steps)
    assert [line["step"] for line in steps] == list(range(1, 9))  # 32 rows, batches of 8, 2 epochs
    assert [line["step"] for line in evaluations] == [0, 8]
    assert [line["epoch"] for line in steps][3::4] == [1.0, 2.0]
    for line in evaluations:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert (run.output_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run.output_dir / "environment.json").read_text())["packages"]["torch"]


def test_the_adapter_it_leaves_is_the_one_it_trained(folder, tmp_path):
    run = lorax.train(recipe(folder, tmp_path / "run"))
    model = lorax.load_model(folder / "model")
    lorax.load_adapter(model, run.output_dir / "adapter")
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids), run.model(ids))


def test_the_same_recipe_is_the_same_run(folder, tmp_path):
    first = lorax.train(recipe(folder, tmp_path / "a", **{"adapter.lora_dropout": 0.2}))
    again = lorax.Recipe.load(
        first.output_dir / "config.toml", {"train.output_dir": str(tmp_path / "b")}
    )
    second = lorax.train(again)
    assert without_times(first.metrics) == without_times(second.metrics)
    one, two = (
        load_file(run.output_dir / "adapter" / "adapter_model.safetensors")
        for run in (first, second)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = lorax.train(recipe(folder, tmp_path / "c", **{"train.seed": 1}))
    assert without_times(other.metrics) != without_times(first.metrics)


def test_micro_batches_change_no_result(folder, tmp_path):
    """A mean of means would: the rows' lengths differ on purpose."""
    runs = [
        lorax.train(recipe(folder, tmp_path / str(size), **{"train.micro_batch_size": size}))
        for size in (1, 3, 8)
    ]
    for run in runs[1:]:
        for line, expected in zip(run.metrics, runs[0].metrics, strict=True):
            for key in ("loss", "eval_loss", "grad_norm", "tokens", "epoch"):
                if key in expected:
                    assert line[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize("change", [{"model.quantization": "nf4-dq"}, {"model.dtype": "bfloat16"}])
def test_it_learns_over_other_bases(change, folder, tmp_path):
    run = lorax.train(recipe(folder, tmp_path / "run", **change))
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    tensors = load_file(run.output_dir / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_gradient_checkpointing_changes_no_number(folder, tmp_path):
    runs = [
        lorax.train(recipe(folder, tmp_path / str(on), **{"model.gradient_checkpointing": on}))
        for on in (False, True)
    ]
    assert without_times(runs[0].metrics) == without_times(runs[1].metrics)


def test_evaluation_does_not_disturb_training(folder, tmp_path):
    seldom = lorax.train(recipe(folder, tmp_path / "a", **{"adapter.lora_dropout": 0.2}))
    often = lorax.train(
        recipe(folder, tmp_path / "b", **{"adapter.lora_dropout": 0.2, "train.eval_steps": 1})
    )
    one, two = ([x for x in without_times(r.metrics) if "loss" in x] for r in (seldom, often))
    assert one == two
    assert len([x for x in often.metrics if "eval_loss" in x]) == 9


def test_no_evaluation_where_none_is_asked_for(folder, tmp_path):
    run = lorax.train(recipe(folder, tmp_path / "run", **{"data.eval_fraction": 0.0}))
    assert not any("eval_loss" in line for line in run.metrics)
    assert len(run.metrics) == 10  # 40 rows


def test_a_loss_that_is_not_finite_stops_before_the_step(folder, tmp_path):
    class Spoil(Listener):
        def planned(self, plan):
            plan.train_rows[:] = plan.train_rows[:8]

    spoiled = recipe(folder, tmp_path / "run", **{"train.learning_rate": 1e30, "train.epochs": 4})
    with pytest.raises(NumericalStop, match=r"step \d+: loss .* was not taken"):
        lorax.train(spoiled, Spoil())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "nan" in (last["loss"], last["grad_norm"]) or "inf" in (last["loss"], last["grad_norm"])
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_directory_that_is_there_is_refused_before_anything_is_loaded(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "keep").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        lorax.train(recipe(folder, tmp_path / "run", **{"model.path": "/nowhere"}))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["keep"]


def test_a_refused_run_writes_nothing(folder, tmp_path):
    with pytest.raises(lorax.LoraxError, match="nothing"):
        lorax.train(recipe(folder, tmp_path / "run", **{"adapter.target_modules": ["nothing"]}))
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_positions_are_a_recipe_error(folder, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 300}) + "\n")
    change = {"data.path": str(tmp_path / "long.jsonl"), "data.eval_fraction": 0.0}
    with pytest.raises(RecipeError, match="301 tokens, but the model's positions end at 256"):
        lorax.train(recipe(folder, tmp_path / "run", **change))
    lorax.train(recipe(folder, tmp_path / "run", **change, **{"data.max_length": 256}))


def test_evaluation_is_the_mean_over_tokens_whatever_the_micro_batches(folder, tmp_path):
    model, tokenizer, plan = prepare(recipe(folder, tmp_path / "run"))
    rows = plan.train_rows
    pad = tokenizer.pad_token_id
    losses = [evaluate(model, rows, size, pad)["eval_loss"] for size in (1, 5, 40)]
    total = tokens = 0.0
    for row in rows:  # one by one, without padding, through plain cross entropy
        (batch,) = micro_batches([row], 1, pad)
        with torch.no_grad():
            logp = model(batch.input_ids)[0].log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.trained[t]:
                total -= logp[t - 1, row.ids[t]].item()
                tokens += 1
    for loss in losses:
        assert loss == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_head_loss_over_a_frozen_head_against_cross_entropy(rows, dtype, monkeypatch):
    """Loss and gradient; the chunked one's error against float64 is at most torch's, and a half."""
    monkeypatch.setattr("lorax.training.loss.CHUNK_LOGITS", 97 * 64)
    head = torch.nn.Linear(32, 97, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(rows, 32, dtype=dtype)
    targets = torch.randint(0, 97, (rows,))

    def run(hidden, function):
        hidden = hidden.clone().requires_grad_()
        loss = function(hidden)
        (loss / 3).backward()
        return loss.detach().double(), hidden.grad.double()

    def plain(hidden):
        logits = hidden @ head.weight.to(hidden.dtype).t()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(wide, targets, reduction="sum")

    truth = run(x.double(), plain)
    reference = run(x, plain)
    ours = run(x, lambda hidden: head_loss(hidden, head, targets))
    for mine, theirs, exact in zip(ours, reference, truth, strict=True):
        assert (mine - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_a_head_that_trains_gets_its_gradient():
    class Embedded(Model):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.lm_head = torch.nn.Linear(8, 11, bias=False)

        def hidden_states(self, ids, context=None):
            return torch.nn.functional.one_hot(ids, 8).float()

    ids = torch.randint(0, 8, (2, 5))
    model = Embedded()
    summed_loss(model, ids, ids).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
