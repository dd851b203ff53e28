"""Everything about lorax that needs a GPU, in two calls of under ten minutes each.

    python benchmarks/gpu_suite.py --call 1     tests, then kernels with a check of each output
    python benchmarks/gpu_suite.py --call 2     steps of Llama-3-8B's shape, generation, paging
    python benchmarks/gpu_suite.py --table      the README's tables from the newest results

Needs torch, triton, numpy, safetensors and pytest; lorax need not be installed. bitsandbytes, and
PEFT with transformers, stand beside lorax where they can be imported; the report says where not.

Each part is a process with its time (gpu_part.py). The report, under --output, is written after
each: what is red or out of time is marked in it, and the parts behind still run. `--tiny` is a dry
run of the same code at a tiny size, on a CPU too: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_optimizers import optimizer_lines
from gpu_tests import STOPPED, finished, run_tests, started

ROOT = Path(__file__).parents[1]
CALLS = {  # each part with its seconds: under ten minutes a call, with the start of the machine
    1: {
        "tests": 230,
        "dequantize": 40,
        "products": 130,
        "step_kernels": 40,
        "loss": 30,
        "optimizers": 60,
    },
    2: {"step": 230, "peft_step": 170, "generation": 70, "paging": 60},
}
TINY_TESTS = ("tests/kernels/test_kernels_tuning.py",)


def run_call(call: int, output: Path, tiny: bool) -> dict[str, Any]:
    """All parts of a call, and the report, which is written behind each part."""
    report: dict[str, Any] = {"call": call, "environment": environment(), "parts": {}}
    begin = time.monotonic()
    path = output / name_of(report)
    output.mkdir(parents=True, exist_ok=True)
    for name, seconds in CALLS[call].items():
        if name == "tests":
            tests = run_tests(TINY_TESTS if tiny else (), seconds)
            report["tests"] = tests
            report["parts"][name] = {
                "status": "ok" if tests["green"] else "red",
                "seconds": tests["seconds"],
            }
        else:
            status, found = run_part(name, seconds, tiny)
            report["parts"][name] = status
            report |= found
        report["seconds"] = round(time.monotonic() - begin, 1)
        path.write_text(json.dumps(report, indent=1))
        print(f"{name}: {report['parts'][name]['status']}, {path}", flush=True)
    return report


def run_part(name: str, seconds: float, tiny: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """How it went, and what it measured, as far as it came."""
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, str(ROOT / "benchmarks/gpu_part.py"), name]
        process = started([*command, "--output", str(path), *(["--tiny"] if tiny else [])])
        code, text = finished(process, begin + seconds)
        found = json.loads(path.read_text()) if path.is_file() else {}
    status = {0: "ok", STOPPED: "out of time"}.get(code, "red")
    about = {"status": status, "seconds": round(time.monotonic() - begin, 1)}
    return about if code == 0 else {**about, "output": text[-4000:]}, found


def name_of(report: dict[str, Any]) -> str:
    gpu = report["environment"]["gpu"].replace(" ", "-")
    return f"{gpu}-{datetime.now():%Y-%m-%d}-call{report['call']}.json"


def environment() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    about: dict[str, Any] = {"gpu": "none (a dry run)"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return {
        **about,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--porcelain", "--untracked-files=no"),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def table(directory: Path) -> str:
    """The README's table, in Markdown, from the newest results; or a line that there are none."""
    reports = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    everything = [report for report in reports if "environment" in report]
    reports = [report for report in everything if "products" in report]
    if not reports:
        return "No GPU has been at hand yet: `make gpu` fills this table."
    report = max(reports, key=lambda found: found["environment"]["date"])
    about = report["environment"]
    lines = [
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit "
        f"{about['commit'][:10]}, {about['date'][:10]}. NF4 with double quantization, bf16, "
        "L2 cold.",
        "",
        "| W | M | lorax, us | p20-p80 | torch bf16 | bitsandbytes | of bandwidth | of bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["products"]:
        if "times" not in row:
            lines.append(f"| {row['N']}x{row['K']} | {row['M']} | the output is wrong | | | | | |")
            continue
        times = {name: found["cold"] for name, found in row["times"].items()}
        mine = times["lorax"]
        rivals = [
            times.get(name, {}).get("median_us", "-") for name in ("torch bf16", "bitsandbytes")
        ]
        cells = [
            f"{row['N']}x{row['K']}",
            row["M"],
            mine["median_us"],
            f"{mine['p20_us']}-{mine['p80_us']}",
            *rivals,
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['share_of_bf16']:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    steps = max(
        (found for found in everything if "step" in found),
        key=lambda found: found["environment"]["date"],
        default={},
    )
    more = [*optimizer_lines(report.get("optimizers", [])), *step_lines(steps)]
    return "\n".join([*lines, *more])


def step_lines(report: dict[str, Any]) -> list[str]:
    """The steps' table, in Markdown; nothing where none was measured."""
    rows = [row for row in [*report.get("step", []), *report.get("peft_step", [])] if "rows" in row]
    if not rows:
        return []
    lines = [
        "",
        f"A QLoRA step at Llama-3-8B's shape, r = 16 on all Linears, bf16, random weights; "
        f"{report['environment']['gpu']}.",
        "",
        "| side | batch | recomputed | step, ms | tokens a second | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['side']} | {row['rows']} x {row['length']} | {row['recompute']} | "
            f"{1000 * row['seconds']:.1f} | {row['tokens_a_second']:,.0f} | "
            f"{row['peak_bytes'] / 1e9:.2f} GB |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--call", type=int, choices=CALLS, default=1)
    parser.add_argument("--tiny", action="store_true", help="a dry run, on a CPU too")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.output))
        return 0
    if not torch.cuda.is_available() and not arguments.tiny:
        print("gpu_suite: no CUDA device here; nothing was measured", file=sys.stderr)
        return 3
    report = run_call(arguments.call, arguments.output, arguments.tiny)
    red = [name for name, part in report["parts"].items() if part["status"] != "ok"]
    for name in red:
        print(f"gpu_suite: {name} is {report['parts'][name]['status']}", file=sys.stderr)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
