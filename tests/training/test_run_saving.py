"""A run saves what it trained before anything that may fail, and a picture costs no run."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from oracles import llama
from safetensors.torch import load_file
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.errors import EnvironmentProblem
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.training import loop, metrics
from lorax.training.loop import Listener


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "model")
    write_tokenizer(tokenizer, folder / "model")
    rows = [{"prompt": "say ", "completion": "b" * (i % 5 + 1)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, output: Path, method: str = "lora", **overrides) -> lorax.Recipe:
    values = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "adapter": {"method": method} | ({} if method == "full" else {"r": 2}),
        "data": {"path": str(folder / "rows.jsonl"), "eval_fraction": 0.25},
        "train": {
            "output_dir": str(output),
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 2,
        },
    }
    return lorax.Recipe.from_dict(values, overrides)


class BlockPicture(Listener):
    """Puts a directory where the picture belongs."""

    def __init__(self, output: Path):
        self.output = output

    def measured(self, line):
        (self.output / "loss.png").mkdir(exist_ok=True)


def no_matplotlib(monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)


def no_room(monkeypatch):
    def full(lines, path):
        raise OSError(28, "No space left on device\nand a second line")

    monkeypatch.setattr(metrics, "plot_loss", full)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("fault", ["directory", "matplotlib"])
def test_a_picture_that_fails_is_one_warning(folder, tmp_path, monkeypatch, caplog, fault, method):
    output = tmp_path / "run"
    listener = BlockPicture(output) if fault == "directory" else None
    if fault == "matplotlib":
        no_matplotlib(monkeypatch)
    with caplog.at_level(logging.WARNING, "lorax"):
        run = lorax.train(recipe(folder, output, method), listener)
    (said,) = [record.getMessage() for record in caplog.records if "picture" in record.message]
    assert str(output / "loss.png") in said
    assert "\n" not in said
    tensors = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}
    assert (output / tensors[method]).is_file()
    assert [line["step"] for line in run.metrics if "eval_loss" in line] == [0, 2]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_full_disk_at_the_picture_is_said_and_what_was_trained_is_saved(
    folder, tmp_path, monkeypatch, method
):
    no_room(monkeypatch)
    with pytest.raises(EnvironmentProblem, match="what was trained is saved"):
        lorax.train(recipe(folder, tmp_path / "run", method))
    tensors = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}
    assert (tmp_path / "run" / tensors[method]).is_file()


def interrupt(*arguments):
    raise KeyboardInterrupt


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(interrupt, KeyboardInterrupt), (out_of_memory, torch.OutOfMemoryError)],
)
def test_the_last_evaluation_comes_after_saving(folder, tmp_path, monkeypatch, fault, kind):
    """Whatever happens in it, the adapter is there; and it is the adapter of the last step."""
    straight = lorax.train(recipe(folder, tmp_path / "straight"))
    honest, calls = loop.evaluate, []

    def second_fails(*arguments):
        calls.append(arguments)
        return honest(*arguments) if len(calls) == 1 else fault(*arguments)

    monkeypatch.setattr(loop, "evaluate", second_fails)
    with pytest.raises(kind) as caught:
        lorax.train(recipe(folder, tmp_path / "run"))
    if kind is KeyboardInterrupt:
        assert "the adapter is saved; go on with: " in str(caught.value)
    ours, theirs = (
        load_file(path / "adapter" / "adapter_model.safetensors")
        for path in (tmp_path / "run", straight.output_dir)
    )
    assert ours
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_an_interrupt_in_training_says_that_nothing_was_saved(folder, tmp_path, caplog):
    class Impatient(BlockPicture):
        def measured(self, line):
            super().measured(line)
            if line["step"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt, match=r"the adapter is not saved; go on with: .*--resume"
    ):
        lorax.train(recipe(folder, tmp_path / "run"), Impatient(tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter").exists()
    assert not caplog.records  # one thing to read


def test_metrics_that_cannot_be_written_are_an_environment_problem(folder, tmp_path, monkeypatch):
    class Full(metrics.MetricsFile):
        def __init__(self, path, keep_bytes):
            super().__init__(path, keep_bytes)
            self._file.close()
            self._file = Path("/dev/full").open("wb")  # noqa: SIM115 - closed by the run

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(loop, "MetricsFile", Full)
    with pytest.raises(
        EnvironmentProblem, match=r"metrics\.jsonl: cannot be written \(No space left"
    ):
        lorax.train(recipe(folder, tmp_path / "run"))
