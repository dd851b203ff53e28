"""`lorax verify --run`: healthy runs hold against PEFT, and each planted fault is named.

The faults are planted in lorax's own step, for the run or for the replay alone.
"""

import json
import shutil

import pytest
import torch
from command_line import run_lorax
from oracles import gpt2
from runs import make_folder, recipe
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.errors import FormatError, LoraxError, UsageError
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.parity.whole_run import verify_run
from lorax.training import loop, processes
from lorax.training.optimizers import set_rates

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_loss", lambda lines, path, warn: None)
        yield


V = "model.layers.1.self_attn.v_proj"
DROPOUT = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("whole"))
    gpt2(vocab_size=261).save_pretrained(folder / "gpt2")
    write_tokenizer(byte_tokenizer(), folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def healthy(folder):
    """A run with dropout, accumulation (3, 3 and 2 rows), warm-up, decay and clipping."""
    settings = {"train.weight_decay": 0.1, "train.warmup_ratio": 0.3, "train.max_grad_norm": 0.5}
    lorax.train(recipe(folder, folder / "healthy", DROPOUT, **settings))
    return folder / "healthy"


HEALTHY = {
    "rslora": ({**DROPOUT, "use_rslora": True, "lora_alpha": 16}, {}),
    "dora": ({**DROPOUT, "use_dora": True}, {"train.weight_decay": 0.1}),
    "a bias that is trained": ({"r": 2, "bias": "lora_only"}, {}),
    "dora on nf4-dq": ({**DROPOUT, "use_dora": True}, {"model.quantization": "nf4-dq"}),
    "lora+": (DROPOUT, {"train.lora_plus_ratio": 8.0, "train.weight_decay": 0.1}),
    "linear, betas": (DROPOUT, {"train.lr_scheduler": "linear", "train.adam_beta2": 0.9}),
    "paged, not clipped": (DROPOUT, {"train.optimizer": "paged-adamw", "train.max_grad_norm": 0.0}),
    "bfloat16": ({"r": 4}, {"model.dtype": "bfloat16"}),
    "gpt2": ({**DROPOUT, "target_modules": ["c_attn", "c_proj"]}, {"model.path": "gpt2"}),
}


def test_a_healthy_run_holds_to_its_last_step(healthy):
    report = verify_run(healthy, 100)
    assert report.holds, report
    assert report.steps == 6
    totals = {t.quantity: t for t in report.totals}
    assert totals["record"].equal == totals["record"].parts == 6 * 4  # the same machine, its bits
    assert totals["adapter tensor"].equal == totals["adapter tensor"].parts
    assert totals["gradient"].parts == totals["parameter"].parts == 6 * 2 * 3 * 7
    assert any("lora_A" in c.part and c.difference.relative > 0 for c in report.checks)


def test_dropout_of_several_processes_is_refused(healthy, tmp_path):
    shared = tmp_path / "shared"
    shutil.copytree(healthy, shared)
    environment = json.loads((shared / "environment.json").read_text())
    assert environment["processes"] == 1
    (shared / "environment.json").write_text(json.dumps(environment | {"processes": 2}))
    with pytest.raises(UsageError, match="was shared by 2 processes, and drew dropout's numbers"):
        verify_run(shared)
    (shared / "environment.json").unlink()  # of a version before
    assert verify_run(shared, 1).holds


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_holds_against_peft(folder, tmp_path, name):
    adapter, changes = HEALTHY[name]
    if "model.path" in changes:
        changes = {"model.path": str(folder / changes["model.path"])}
    lorax.train(recipe(folder, tmp_path / "run", adapter, **{"train.max_steps": 3, **changes}))
    report = verify_run(tmp_path / "run", 2)
    assert report.holds, report
    assert report.steps == 2


# Faults --------------------------------------------------------------------------------------


def rate_is_a_step_off(patch):
    honest = loop.rate_factor
    patch.setattr(loop, "rate_factor", lambda kind, step, *rest: honest(kind, step + 1, *rest))


def rate_is_not_set(patch):
    """The line of metrics.jsonl is right, the optimizer's rate is 1 % off from step 3 on."""
    calls = []

    def off(optimizer, base_rates, factor):
        calls.append(factor)
        set_rates(optimizer, base_rates, factor * (1.01 if len(calls) >= 3 else 1.0))

    patch.setattr(loop, "set_rates", off)


def gradients_pile_up(patch):
    patch.setattr(lorax.optim.AdamW, "zero_grad", lambda self, set_to_none=True: None)


def clipping_is_off(patch):
    patch.setattr(loop, "_clip", lambda own, most: torch.nn.utils.clip_grad_norm_(own, 1e9))


def one_gradient_is_scaled(patch):
    honest = loop.Training._backward

    def scaled(self, rows):
        loss = honest(self, rows)
        if self.live.progress.step == 2:
            self.model.get_submodule(V).lora_B.grad.mul_(1.001)
        return loss

    patch.setattr(loop.Training, "_backward", scaled)


def rows_in_another_order(patch):
    honest = loop.step_batches

    def other(rows, size, seed, *more):
        return honest(rows, size, seed + 1, *more)

    patch.setattr(loop, "step_batches", other)


def a_mean_of_means(patch):
    """Each micro-batch divided by its own tokens: the old fault of accumulation."""

    def means(self, rows):
        loss = torch.zeros(())
        for batch in loop.micro_batches(rows, self.settings.micro_batch_size, self.pad_id):
            part = processes.summed_loss(self.model, batch.input_ids, batch.labels)
            part = part / (batch.labels[:, 1:] != -100).sum() / 3
            part.backward()
            loss += part.detach()
        return loss

    patch.setattr(loop.Training, "_backward", means)


def no_decay(patch):
    honest = loop.build_optimizer

    def plain(model, settings):
        return honest(model, settings.model_copy(update={"weight_decay": 0.0}))

    patch.setattr(loop, "build_optimizer", plain)


FAULTS = [
    (rate_is_a_step_off, 1, "rate", ""),
    (rate_is_not_set, 3, "parameter", ""),
    (gradients_pile_up, 2, "gradient", ""),
    (clipping_is_off, 1, "clipped", ""),
    (one_gradient_is_scaled, 2, "gradient", V),
    (rows_in_another_order, 1, "rows", ""),
    (a_mean_of_means, 1, "loss", ""),
    (no_decay, 1, "parameter", ""),
]


@pytest.mark.parametrize(("plant", "step", "quantity", "module"), FAULTS)
def test_a_fault_in_a_step_is_named(healthy, monkeypatch, plant, step, quantity, module):
    plant(monkeypatch)
    report = verify_run(healthy, 4)
    first = report.first_difference
    assert not report.holds
    assert (first["step"], first["quantity"]) == (step, quantity)
    assert first["module"].startswith(module or "model.layers.")
    assert first["part"].startswith("lora_")
    assert f"first at step {step}, {first['module']}.{first['part']} ({quantity})" in str(report)
    if plant is clipping_is_off:
        assert "max_grad_norm" in first["note"]


@pytest.mark.parametrize(
    ("plant", "step"), [(clipping_is_off, 3), (one_gradient_is_scaled, 2), (a_mean_of_means, 1)]
)
def test_a_run_that_went_wrong_then_is_told_from_the_replay(folder, tmp_path, plant, step):
    # Adam's first step is the same for every multiple of a gradient: clipping shows later.
    """lorax is healthy today; what the run wrote down is not what its recipe gives."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        changes = {"train.max_grad_norm": 0.5}
        lorax.train(recipe(folder, tmp_path / "run", DROPOUT, **changes))
    report = verify_run(tmp_path / "run", 4)
    assert not report.holds
    first = report.first_difference
    assert (first["step"], first["quantity"]) == (step, "record")
    assert "on record" in first["note"]


# The command and its refusals ------------------------------------------------------------------


def test_the_command(healthy, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    said = run_lorax("verify", "--run", healthy, "--steps", 2, "--html", page)
    assert "holds: the first 2 steps are PEFT's" in said
    assert "holds: the first 2 steps" in page.read_text()
    rows_in_another_order(monkeypatch)
    found = json.loads(run_lorax("verify", "--run", healthy, "--steps", 2, "--json", code=1))
    assert found["first_difference"]["step"] == 1
    assert found["first_difference"]["quantity"] == "rows"
    assert found["steps"] == 2
    run_lorax("verify", code=2)
    run_lorax("verify", healthy, "--run", healthy, code=2)


REFUSED = {
    "adalora": ({"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}, {}),
    "full": ({"method": "full"}, {}),
    "prompt-tuning": ({"method": "prompt-tuning", "num_virtual_tokens": 4}, {}),
    "adamw-8bit": (DROPOUT, {"train.optimizer": "adamw-8bit"}),
    "int8": (DROPOUT, {"model.quantization": "int8"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_does_not_train_is_refused_by_name(folder, tmp_path, name):
    adapter, changes = REFUSED[name]
    (tmp_path / "config.toml").write_text(recipe(folder, tmp_path, adapter, **changes).to_toml())
    with pytest.raises(UsageError, match=name):
        verify_run(tmp_path)


def test_no_run_is_one_line(tmp_path, healthy):
    for directory, kind in ((tmp_path, FormatError), (tmp_path / "none", LoraxError)):
        with pytest.raises(kind):
            verify_run(directory)
    (tmp_path / "config.toml").write_text((healthy / "config.toml").read_text())
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FormatError, match="no step"):
        verify_run(tmp_path)
    with pytest.raises(UsageError, match="steps is 0"):
        verify_run(healthy, 0)
