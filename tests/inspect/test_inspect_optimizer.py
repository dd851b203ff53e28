"""`lorax inspect optimizer`: the state in bytes by name, and the paging counters of a run."""

import json
import sys

import pytest
import torch
from torch import nn

from lorax import cli
from lorax.errors import EnvironmentProblem, FormatError, RecipeError
from lorax.formats.optimizer_files import save_optimizer_state
from lorax.inspect.optimizer import add_up, inspect_optimizer
from lorax.optim import AdamW, AdamW8bit, PagedAdamW
from lorax.optim.paged import PagingCounters

RECIPE = """[model]
path = "base"
[data]
path = "rows.jsonl"
[train]
output_dir = "run"
optimizer = "{optimizer}"
"""


def counters(managed, moved_in, moved_out, seconds):
    return {
        "managed_bytes": managed,
        "prefetched_in_bytes": moved_in,
        "prefetched_out_bytes": moved_out,
        "waited_seconds": seconds,
    }


def a_run(folder, optimizer="adamw", lines=({}, {}, {})):
    """A run's directory with metrics.jsonl: one line a step, and an evaluation behind it."""
    folder.mkdir()
    (folder / "config.toml").write_text(RECIPE.format(optimizer=optimizer))
    content = [{"step": n, "loss": 1.0, **line} for n, line in enumerate(lines, 1)]
    content.append({"step": len(lines), "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    return folder


def save_state(kind, path, **settings):
    ps = [nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(10))]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = kind(ps, **settings)
    optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_optimizer_state(optimizer.state_dict(), path)
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values())


@pytest.fixture
def command(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorax", "inspect", "optimizer", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capfd.readouterr()
        return code, found.out, found.err

    return run


def test_a_run_that_paged(tmp_path, command):
    lines = [counters(4096, 4096 * n, 4000 * n, 0.25 * n) for n in (1, 2, 3)]
    run = a_run(tmp_path / "run", "paged-adamw", lines)
    held = save_state(PagedAdamW, run / "checkpoints/step-00000003/optimizer.safetensors")
    save_state(PagedAdamW, run / "checkpoints/step-00000002/optimizer.safetensors")
    code, out, err = command(run)
    assert (code, err) == (0, "")
    for words in ("paged-adamw, after step 3", "step-00000003", "exp_avg_sq", f"{held:,}"):
        assert words in out
    for number in ("4,096", "12,288", "12,000", "0.750"):
        assert number in out
    found = json.loads(command(run, "--json")[1])
    assert found["paging"] == counters(4096, 12288, 12000, 0.75)
    assert found["state_bytes"] == held
    assert found["parameters"] == 64 * 64 + 10
    parts = {(part["name"], part["dtype"]): part for part in found["state"]}
    assert parts["exp_avg", "float32"]["nbytes"] == 4 * (64 * 64 + 10)
    assert parts["step", "float32"]["tensors"] == 2


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("adamw", "0 bytes managed; adamw is not paged (paged-adamw is)"),
        ("adamw-8bit", "0 bytes managed; adamw-8bit is not paged (paged-adamw-8bit is)"),
        ("paged-adamw", "0 bytes managed; without a CUDA device"),
    ],
)
def test_a_run_that_did_not_page_says_so(tmp_path, command, optimizer, words):
    run = a_run(tmp_path / "run", optimizer)
    code, out, _ = command(run)
    assert code == 0
    assert words in out
    assert "none is saved" in out
    found = json.loads(command(run, "--json")[1])
    assert found["paging"] == counters(0, 0, 0, 0.0)
    assert (found["state"], found["state_bytes"], found["steps"]) == ([], 0, 3)


def test_a_checkpoint_or_a_file_alone(tmp_path, command):
    path = tmp_path / "step-00000001" / "optimizer.safetensors"
    held = save_state(AdamW8bit, path)
    for place in (path, path.parent):
        code, out, _ = command(place)
        assert code == 0
        assert "exp_avg_absmax" in out
        assert "uint8" in out
        assert "unknown" in out
        report = inspect_optimizer(place)
        assert report.state_bytes == held
        assert report.paging is None


def test_the_bytes_are_those_that_the_optimizer_tells(tmp_path):
    """2.03 a parameter in 8 bits; 8 in 32; both and 4 a tensor for the step."""
    path = tmp_path / "s.safetensors"
    for kind, settings in ((AdamW, {}), (AdamW8bit, {"min_8bit_size": 0})):
        held = save_state(kind, path, **settings)
        report = inspect_optimizer(path)
        assert report.state_bytes == held
        assert len(report.state) == (3 if kind is AdamW else 5)


def test_counters_start_again_with_a_resume():
    """A process counts from zero; the run is the sum of its processes."""
    first = [counters(10, 10, 5, 0.5), counters(10, 20, 10, 1.0)]
    second = [counters(12, 7, 3, 0.25), counters(12, 14, 6, 0.5)]
    assert add_up([*first, *second]) == PagingCounters(12, 34, 16, 1.5)
    assert add_up([]) == PagingCounters()
    assert add_up([{"loss": 1.0}]) == PagingCounters()


def test_a_run_that_is_under_way_or_was_cut_off(tmp_path):
    run = a_run(tmp_path / "run", "paged-adamw", [counters(8, 8, 8, 0.1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert inspect_optimizer(run).paging == PagingCounters(8, 8, 8, 0.1)
    (run / "metrics.jsonl").write_text("")
    report = inspect_optimizer(run)
    assert (report.steps, report.paging) == (None, PagingCounters())
    (run / "config.toml").unlink()
    assert inspect_optimizer(run).optimizer is None


MISTAKES = [
    (3, "nowhere: no such file or directory", EnvironmentProblem, "nowhere"),
    (4, "expected a run's directory, a checkpoint's, or a state's file", FormatError, "empty"),
    (4, "no lorax_optimizer in its metadata", FormatError, "weights.safetensors"),
    (4, "not a readable safetensors file", FormatError, "text.safetensors"),
    (4, "metrics.jsonl:1: not valid JSON", FormatError, "broken"),
    (4, "managed_bytes = 'much'; expected 0 or more", FormatError, "odd"),
    (2, "config.toml: train.optimizer", RecipeError, "unknown"),
]


@pytest.mark.parametrize(("code", "words", "kind", "name"), MISTAKES, ids=[m[3] for m in MISTAKES])
def test_a_mistake_is_one_line_and_an_exit_code(
    tmp_path, monkeypatch, command, code, words, kind, name
):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (a_run(tmp_path / "broken") / "metrics.jsonl").write_text("{\n")
    a_run(tmp_path / "odd", lines=[{"managed_bytes": "much"}])
    a_run(tmp_path / "unknown", optimizer="sgd")
    with pytest.raises(kind):
        inspect_optimizer(name)
    found, out, err = command(name)
    assert found == code
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_it_has_help(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "lorax inspect optimizer" in out
