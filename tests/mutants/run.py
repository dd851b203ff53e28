"""Plant each fault of faults.py in a copy of the tree, and see whether its tests notice.

    python tests/mutants/run.py                 all; `make mutants`
    python tests/mutants/run.py --check         only whether each fault's text is found once
    python tests/mutants/run.py zero_grad eps   those that have one of these words in their texts

Exit code 1 where a fault survives, or its text is not found exactly once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
PARTS = "lorax kernels tests benchmarks configs docs pyproject.toml README.md".split()
TEST_SECONDS = 120
FAULT_SECONDS = 900


def home(fault: Fault, root: Path = ROOT) -> Path:
    """The one file that holds the fault's text, once.

    Raises:
        LookupError: there is none, or more than one place.
    """
    counts = {path: path.read_text().count(fault.old) for path in root.glob(fault.files)}
    if sum(counts.values()) != 1:
        raise LookupError(f"{fault.files}: {sum(counts.values())} times, not once: {fault.old}")
    return max(counts, key=lambda path: counts[path])


def check(faults: list[Fault]) -> list[str]:
    """What is wrong with the list: a line for each fault that cannot be planted."""
    wrong = []
    for fault in faults:
        try:
            home(fault)
        except LookupError as error:
            wrong.append(str(error))
    return wrong


def copy_tree(target: Path) -> None:
    """What the tests need; with kernels/ as lorax.kernels, so that the copy's is imported."""
    leave_out = shutil.ignore_patterns("__pycache__", ".*")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=leave_out)
        elif source.is_file():
            shutil.copy2(source, target / name)
    (target / "lorax" / "kernels").symlink_to(target / "kernels")


def tests_fail(tree: Path, arguments: str) -> tuple[bool, str]:
    """Run the tests over the copy: whether one fails, and its name."""
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
    command = [sys.executable, "-m", "pytest", *options, *shlex.split(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True,
            timeout=FAULT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True, "it hangs"
    if done.returncode not in (0, 1):  # no tests, or a wrong argument
        raise RuntimeError(
            f"pytest {arguments}: exit code {done.returncode}\n{done.stdout[-2000:]}"
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0].split(" - ")[0] if failed else ""


def plant(fault: Fault, tree: Path) -> tuple[bool, str]:
    """Whether the tests notice, and which."""
    path = home(fault, tree)
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    try:
        return tests_fail(tree, fault.tests)
    finally:
        path.write_text(whole)


def main() -> int:
    """Parse, plant, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults with one of these in their texts")
    parser.add_argument("--check", action="store_true", help="plant nothing")
    given = parser.parse_args()
    texts = {fault: f"{fault.files} {fault.old} {fault.why}" for fault in FAULTS}
    faults = [f for f in FAULTS if not given.words or any(w in texts[f] for w in given.words)]
    wrong = check(faults)
    for line in wrong:
        print(line)
    if given.check or wrong:
        print(f"{len(faults) - len(wrong)} of {len(faults)} faults can be planted")
        return 1 if wrong else 0
    survived = 0
    with tempfile.TemporaryDirectory(prefix="lorax-mutants-") as folder:
        copy_tree(Path(folder))
        for fault in faults:
            start = time.perf_counter()
            caught, name = plant(fault, Path(folder))
            survived += not caught
            seconds = time.perf_counter() - start
            word = f"caught by {name}" if caught else f"SURVIVED {fault.tests}"
            print(f"{seconds:6.1f} s  {fault.why}: {word}", flush=True)
    print(f"{len(faults) - survived} of {len(faults)} faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
