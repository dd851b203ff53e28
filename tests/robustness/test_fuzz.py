"""Wounded files of the kinds that a run leaves behind and goes on with (S5).

test_hostile_files.py has those of models, adapters, recipes and rows.
"""

import json
import shutil

import pytest
from mutating import refused_mutations
from runs import KillAt, Killed, make_folder, recipe

import lorax
from lorax.errors import LoraxError
from lorax.formats.optimizer_files import load_optimizer_state
from lorax.formats.run_record import read_record
from lorax.inspect.optimizer import inspect_optimizer
from lorax.training.checkpoint import check_checkpoint, newest_checkpoint
from lorax.training.metrics import MetricsFile, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run that was killed at its fifth step, with checkpoints."""
    folder = make_folder(tmp_path_factory.mktemp("fuzz"))
    with pytest.raises(Killed):
        lorax.train(recipe(folder, folder / "run"), KillAt(5))
    return folder


def _kept(run):
    """metrics.jsonl as a run that goes on reads it: all that the checkpoint knew of."""
    metrics = run / "metrics.jsonl"
    MetricsFile(metrics, metrics.stat().st_size).close()
    read_metrics(metrics)


def _checkpoint(run):
    check_checkpoint(newest_checkpoint_name(run))
    if newest_checkpoint(run / "checkpoints") is None:
        raise LoraxError("none is left")


def newest_checkpoint_name(run):
    return max((run / "checkpoints").glob("step-*"))


STATE = "checkpoints/step-00000004/optimizer.safetensors"
FILES = {
    "metrics.jsonl": _kept,
    "metrics.jsonl inspected": inspect_optimizer,
    "metrics.jsonl of a run that is finished": lambda run: read_metrics(run / "metrics.jsonl"),
    "checkpoints/step-00000004/state.json": _checkpoint,
    "config.toml": lambda run: lorax.Recipe.load(run / "config.toml"),
    "config.toml as a record": lambda run: read_record(run / "adapter"),
    "checkpoints/step-00000004/manifest.json": _checkpoint,
    STATE: lambda run: load_optimizer_state(run / STATE),
}


@pytest.mark.parametrize("name", FILES)
def test_only_loraxerror_escapes_from_what_a_run_left(left, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(left / "run", run)
    (run / "adapter").mkdir(exist_ok=True)
    file = run / name.partition(" ")[0]
    assert file.is_file(), sorted(str(p.relative_to(run)) for p in run.rglob("*"))
    assert refused_mutations(file, lambda: FILES[name](run), name) > 10


def test_a_checkpoint_with_any_wounded_file_is_passed_over(left, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(left / "run", run)
    newest = newest_checkpoint_name(run)
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 20)):
            wounded = bytearray(content)
            wounded[place] ^= 1
            file.write_bytes(wounded)
            found = newest_checkpoint(run / "checkpoints")
            assert found is not None, file
            assert found != newest, (file, place)
        file.write_bytes(content)
    assert newest_checkpoint(run / "checkpoints") == newest


@pytest.mark.parametrize("text", ["null", "[]", "3", '"a"', "{}", "[[]]", "NaN"])
def test_a_manifest_of_another_kind_is_damage(left, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(left / "run", run)
    newest = newest_checkpoint_name(run)
    manifest = json.loads((newest / "manifest.json").read_text())
    for content in (text, json.dumps({**manifest, "files": text}), json.dumps({"step": text})):
        (newest / "manifest.json").write_text(content)
        with pytest.raises(LoraxError):
            check_checkpoint(newest)
