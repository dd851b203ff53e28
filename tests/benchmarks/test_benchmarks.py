"""The benchmarks of optimizers on a CPU, and gpu_suite.py as far as it goes without a GPU."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import kernel_testing  # noqa: F401  first: it mends the interpreter
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = {"lorax AdamW", "lorax AdamW8bit", "lorax PagedAdamW", "lorax PagedAdamW8bit"}


def benchmark(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def suite():
    return benchmark("gpu_suite")


@pytest.fixture(scope="module")
def timing():
    return benchmark("gpu_optimizers")


@pytest.fixture(scope="module")
def optimizers(timing):
    """All sides, over six small tensors on a CPU: the numbers mean nothing, the rows do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes says that it pages nothing on a CPU
        return timing.time_optimizers("cpu", tensors=6, width=64, repeats=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_measures_nothing_and_says_so(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--output", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "gpu_suite: no CUDA device here; nothing was measured\n"
    assert done.stdout == ""
    assert not (tmp_path / "results").exists()


def test_the_four_optimizers_are_timed_beside_their_rivals(optimizers):
    names = {row["name"] for row in optimizers}
    assert names >= ROWS | {"torch AdamW fused", "torch AdamW foreach=False"}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return
    assert names >= {"bitsandbytes AdamW8bit", "bitsandbytes PagedAdamW"}


def test_an_optimizer_s_row(optimizers):
    for row in optimizers:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["median_us"] <= row["settled_median_us"]
    rows = {row["name"]: row for row in optimizers}
    assert rows["lorax AdamW"]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert rows["lorax PagedAdamW"]["paging"]["managed_bytes"] == 0
    assert "paging" not in rows["lorax AdamW"]


def test_a_side_that_fails_is_left_out_and_named(timing, monkeypatch, capsys):
    def broken(params):
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(
        timing,
        "optimizer_sides",
        lambda: {"broken": broken, "torch AdamW fused": torch.optim.AdamW},
    )
    rows = timing.time_optimizers("cpu", tensors=2, width=8, repeats=3)
    assert [row["name"] for row in rows] == ["torch AdamW fused"]
    assert "broken is not timed: RuntimeError('no such thing here')" in capsys.readouterr().out


def a_report(date, **more):
    cold = {"median_us": 10.0, "p20_us": 9.0, "p80_us": 11.0}
    product = {
        "N": 4096, "K": 4096, "M": 1,
        "times": {"lorax": {"cold": cold}, "torch bf16": {"cold": {**cold, "median_us": 30.0}}},
        "share_of_bandwidth": 0.8, "share_of_bf16": 0.01,
    }  # fmt: skip
    about = {"gpu": "a GPU", "torch": "2.13", "triton": "3.9", "commit": "0" * 40, "date": date}
    return {"environment": about, "products": [product], **more}


def test_the_table_comes_from_the_newest_results(suite, tmp_path, optimizers):
    assert "`make gpu` fills this table" in suite.table(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "old.json").write_text(json.dumps(a_report("2026-01-01T00:00:00")))
    table = suite.table(tmp_path)
    assert "| 4096x4096 | 1 | 10.0 | 9.0-11.0 | 30.0 | - | 80% | 1% |" in table
    assert "450 LoRA tensors" not in table
    new = a_report("2026-02-01T00:00:00", optimizers=optimizers)
    (tmp_path / "new.json").write_text(json.dumps(new))
    lines = suite.table(tmp_path).splitlines()
    assert "2026-02-01" in lines[0]
    (fused,) = [line for line in lines if line.startswith("| torch AdamW fused |")]
    assert "| 1.00 |" in fused
    for name in ROWS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1


def test_the_gpu_tests_are_collected_with_the_kernels(suite):
    """`make gpu` runs these files first; here each test is found, and skipped."""
    source = (BENCHMARKS / "gpu_tests.py").read_text()
    assert "test_optim_gpu.py" in source
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=",
         Path(__file__).parents[1] / "optim/test_optim_gpu.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "test_step_times_for_450_lora_tensors" in done.stdout


def test_the_cpu_benchmark_has_all_four_in_one_run(monkeypatch):
    """benchmarks/optimizers.py: refuses to time what is not bit-equal; then bytes and times."""
    optimizers = benchmark("optimizers")
    monkeypatch.setattr(optimizers, "LAYERS", 1)
    optimizers.check_bits(steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {row["name"]: row for row in optimizers.measure(rounds=1)}
    assert set(rows) >= ROWS | {"torch AdamW foreach=False", "torch AdamW fused=True"}
    assert all(row["milliseconds"] > 0 for row in rows.values())
    for name in ("lorax AdamW", "lorax PagedAdamW"):
        assert rows[name]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    for name in ("lorax AdamW8bit", "lorax PagedAdamW8bit"):
        assert 2.03 < rows[name]["state_bytes_per_parameter"] < 2.3

    class Off(optimizers.AdamW):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0] += 1e-3

    monkeypatch.setattr(optimizers, "AdamW", Off)
    with pytest.raises(SystemExit, match="not bit-equal to torch: nothing is timed"):
        optimizers.check_bits(steps=1)


def test_the_gpu_suite_measures_memory_with_the_device_to_itself(monkeypatch, capsys):
    """test_optim_gpu reads what the whole device has free: beside other processes that moves."""
    tests = benchmark("gpu_tests")
    running, finished, alone = [], [], []

    def started(command, **options):
        if any("test_optim_gpu" in str(word) for word in command):
            alone.append(len(running) - len(finished))
        running.append(command)
        return command

    def end(process, deadline):
        finished.append(process)
        return 0, "1 passed"

    monkeypatch.setattr(tests, "collected", lambda command, files: ["a::b", "a::c"])
    monkeypatch.setattr(tests, "started", started)
    monkeypatch.setattr(tests, "finished", end)
    assert tests.run_tests()["green"]
    assert len(running) > 1
    assert alone == [0]
