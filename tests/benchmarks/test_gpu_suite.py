"""The GPU suite dry: every part at a tiny size on a CPU, where only a bare machine's packages are.

The numbers mean nothing; that each part runs, checks its output and writes its rows does.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import kernel_testing  # noqa: F401  first: it mends the interpreter
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_part  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_tests  # noqa: E402
import gpu_timer  # noqa: E402

MISSING = ("bitsandbytes", "pydantic", "cyclopts", "tomli_w", "gguf", "lorax_finetuning")
BLOCKER = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Python processes started from here find none of MISSING."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tmp_path


def dry(call, output):
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--call", str(call), "--tiny"]
    done = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, check=False
    )
    (path,) = output.glob("*.json")
    return done, json.loads(path.read_text())


def test_the_packages_are_really_missing(bare):
    code = "import torch, triton; import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "No module named 'bitsandbytes'" in done.stderr


def test_the_first_call_dry(bare):
    done, report = dry(1, bare / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["status"] for part in report["parts"].values()} == {"ok"}
    assert list(report["parts"]) == list(gpu_suite.CALLS[1])
    assert report["tests"]["green"]
    assert [row["M"] for row in report["products"]] == [1, 3]
    for rows in (report["dequantize"], report["products"], report["step_kernels"], report["loss"]):
        assert all("times" in row for row in rows)
        assert not any(gpu_part.is_red(row) for row in rows)
    assert "| 64x128 | 3 |" in gpu_suite.table(bare / "out")


def test_the_second_call_dry(bare):
    done, report = dry(2, bare / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["status"] for part in report["parts"].values()} == {"ok"}
    steps = [row for row in report["step"] if "rows" in row]
    assert [row["recompute"] for row in steps] == [True, "selective", False]
    assert all(row["seconds"] > 0 for row in steps)
    (agreement,) = [row["agreement"] for row in report["step"] if "agreement" in row]
    assert agreement["gradients"] < 0.05
    assert "missing" in report["peft_step"][0], "bitsandbytes is not there, and the report says so"
    assert report["generation"][0]["tokens_a_second"] > 0
    assert report["paging"][0]["check"]["ok"]


def test_a_red_part_marks_the_report_and_costs_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "CALLS", {1: {"tests": 60, "one": 5, "two": 5}})
    monkeypatch.setattr(
        gpu_suite, "run_tests", lambda *a: {"green": False, "red": ["one failed"], "seconds": 1}
    )

    def part(name, seconds, tiny):
        red = name == "one"
        return {"status": "red" if red else "ok", "seconds": 1}, {name: [{"measured": True}]}

    monkeypatch.setattr(gpu_suite, "run_part", part)
    report = gpu_suite.run_call(1, tmp_path, tiny=True)
    assert [p["status"] for p in report["parts"].values()] == ["red", "red", "ok"]
    assert report["two"] == [{"measured": True}]
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == report


def test_what_runs_out_of_time_is_ended_with_what_it_started():
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    begin = time.monotonic()
    process = gpu_tests.started([sys.executable, "-c", code])
    status, output = gpu_tests.finished(process, begin + 3)
    assert status == gpu_tests.STOPPED
    assert output.startswith("begun")
    assert "still running when its time was over" in output
    assert time.monotonic() - begin < 30


def test_each_call_ends_under_ten_minutes():
    for parts in gpu_suite.CALLS.values():
        assert sum(parts.values()) + 60 * ("tests" in parts) <= 600


def test_a_wrong_output_has_no_time():
    import torch

    truth = torch.randn(8, 8)
    plain = truth + 1e-3 * torch.randn(8, 8)
    assert gpu_timer.checked(plain, plain, truth)["ok"]
    assert not gpu_timer.checked(truth + 0.1, plain, truth)["ok"]
    assert not gpu_timer.checked(truth * float("nan"), plain, truth)["ok"]
    assert gpu_part.is_red({"a": [{"check": {"ok": False}}]})
    assert not gpu_part.is_red({"a": [{"check": {"ok": True}}], "b": 3})


def test_the_steps_have_a_table():
    row = {"rows": 1, "length": 2048, "recompute": True, "seconds": 0.154}
    row |= {"tokens_a_second": 13300.0, "peak_bytes": 7.6e9}
    report = {"environment": {"gpu": "a GPU"}, "step": [{"side": "lorax", **row}]}
    lines = gpu_suite.step_lines(report)
    assert lines[-1] == "| lorax | 1 x 2048 | True | 154.0 | 13,300 | 7.60 GB |"
    assert gpu_suite.step_lines({}) == []
