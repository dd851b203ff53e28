"""torchrun with 2 and 4 processes on a CPU: one process's run, shared out.

torchrun as a program takes Ctrl-C below; the other runs come from its launcher (launched.py), which
gives each process the same environment.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import launch_lorax
from runs import make_folder, recipe
from safetensors.torch import load_file

import lorax
from lorax.data.batches import micro_batches, pad
from lorax.data.examples import Example
from lorax.errors import RecipeError
from lorax.training import processes
from lorax.training.processes import Processes

ADAPTER = {"r": 4, "target_modules": "all-linear"}


def launched(count, path, *more, fails=False):
    """Train a recipe in so many processes; what they printed."""
    done = launch_lorax(count, "train", path, *more)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def written(folder, name, adapter=ADAPTER, **overrides):
    """The path of a recipe whose run is called `name`."""
    path = folder / f"{name}.toml"
    path.write_text(recipe(folder, folder / name, adapter, **overrides).to_toml())
    return path


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_within_rounding(first, second):
    """Losses to 1e-6, the adapter to 1e-6 of its norm, each of its tensors to 1e-5.

    A single tensor may be further off than all of them: where a gradient is nearly zero, Adam
    divides its rounding by its own size.
    """
    lines = metrics(first), metrics(second)
    assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]]
    for one, two in zip(*lines, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert (key in one) == (key in two)
            assert one.get(key, 0.0) == pytest.approx(two.get(key, 0.0), rel=1e-6)
    one, two = adapter(first), adapter(second)
    assert one.keys() == two.keys()
    assert all((one[k] - two[k]).norm() <= 1e-5 * one[k].norm() for k in one)
    flat = [torch.cat([t[k].flatten() for k in sorted(t)]) for t in (one, two)]
    assert (flat[0] - flat[1]).norm() <= 1e-6 * flat[0].norm()
    assert flat[0].norm() > 0


several = pytest.mark.slow  # each process imports torch for itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(folder):
    """One process's run, of 19 rows in batches of 8."""
    return lorax.train(lorax.Recipe.load(written(folder, "alone"))).output_dir


@several
def test_two_processes_then_four_from_their_checkpoint(folder, alone):
    path = written(folder, "shared")
    said = launched(2, path, "--train.nan_policy", "rollback", "--train.keep_checkpoints", "9")
    assert said.stdout.count("held-out loss") == 3  # one process speaks
    assert said.stdout.count(f"adapter  {folder / 'shared' / 'adapter'}") == 1
    same_within_rounding(alone, folder / "shared")
    run = folder / "shared"
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    for late in ("step-00000004", "step-00000006"):  # as if it had ended behind step 2 ...
        for file in (run / "checkpoints" / late).glob("*"):
            file.unlink()
        if (run / "checkpoints" / late).is_dir():
            (run / "checkpoints" / late).rmdir()
    for file in (run / "adapter").glob("*"):  # ... without a result
        file.unlink()
    (run / "adapter").rmdir()
    said = launched(4, run / "config.toml", "--resume", "--train.parallel", "fsdp")
    assert "step     3" in said.stdout
    assert "step     2  loss" not in said.stdout
    same_within_rounding(alone, run)


@several
@pytest.mark.parametrize("quantization", ["nf4-dq", "int8"])
def test_a_sharded_quantized_base(folder, quantization):
    # int8 decides by micro-batch what it multiplies in 16 bits; two steps have the same ones.
    steps = {"nf4-dq": 3, "int8": 2}[quantization]
    more = {"model.quantization": quantization, "model.gradient_checkpointing": True}
    more |= {"train.max_steps": steps}
    dora = {**ADAPTER, "use_dora": True} if quantization == "nf4-dq" else ADAPTER
    path = written(folder, f"whole-{quantization}", dora, **more)
    whole = lorax.train(lorax.Recipe.load(path)).output_dir
    name = f"parts-{quantization}"
    more |= {"train.parallel": "fsdp"}
    launched(2, written(folder, name, dora, **more))
    same_within_rounding(whole, folder / name)


@several
def test_ctrl_c_saves_a_checkpoint_although_everybody_tells_everybody(folder):
    """The terminal tells torchrun and all processes, and torchrun tells the processes again."""
    path = written(folder, "stopped", **{"train.max_steps": 5000, "train.save_steps": 0})
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lorax", "train"]
    process = subprocess.Popen(
        [sys.executable, *start, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if "loss" in line and "step     2" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        said = "".join(process.communicate(timeout=120))
    finally:
        process.kill()
    assert "go on with: lorax train" in said
    (checkpoint,) = (folder / "stopped" / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    assert 2 <= state["progress"]["step"] < 5000


@several
def test_an_error_of_all_is_said_once(folder):
    path = written(folder, "refused", **{"data.path": str(folder / "nothing.jsonl")})
    said = launched(2, path, fails=True)
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert "nothing.jsonl: cannot be read" in line


@several
def test_packed_rows(folder):
    more = {"data.packing": True, "data.max_length": 32, "train.max_steps": 3}
    whole = lorax.train(lorax.Recipe.load(written(folder, "packed", **more))).output_dir
    launched(2, written(folder, "packed-by-two", **more))
    same_within_rounding(whole, folder / "packed-by-two")


def test_a_base_that_is_trained_is_not_sharded(folder):
    with pytest.raises(RecipeError, match=r"train\.parallel = 'fsdp' shards the frozen base, and"):
        written(folder, "full", {"method": "full"}, **{"train.parallel": "fsdp"})


def test_a_gpu_by_its_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(RecipeError, match="each takes its own GPU; write 'cuda'"):  # noqa: SIM117
        with processes.processes("cuda:0"):
            pass


class One(Processes):
    """One of several, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    most=st.integers(1, 8),
    size=st.integers(1, 5),
)
def test_every_row_is_computed_once_and_all_do_as_much(lengths, most, size):
    rows = [Example([i + 1] * n, [True] * n) for i, n in enumerate(lengths)]
    groups = [One(rank, size) for rank in range(size)]
    cut = micro_batches(rows, groups[0].micro_batch_size(len(rows), most), 0)
    shares = [group.share(cut) for group in groups]
    assert len({len(share) for share in shares}) == 1  # gathering weights needs all of them
    labels = [label for share in shares for b in share for label in b.labels.flatten().tolist()]
    expected = [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    assert sorted(label for label in labels if label != -100) == expected
    idle = sum((batch.labels == -100).all().item() for share in shares for batch in share)
    assert idle < size
    assert all(len(b.labels) <= most for share in shares for b in share)


def test_alone_nothing_changes():
    rows = [Example([1] * n, [True] * n) for n in (3, 2, 5)]
    group, cut = Processes(), micro_batches(rows, 2, 0)
    assert group.share(cut) == cut
    assert group.micro_batch_size(3, 2) == 2
    state = torch.get_rng_state()
    group.seed(0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert pad(rows, 0).labels.shape == (3, 5)
