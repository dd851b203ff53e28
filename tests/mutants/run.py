"""Plant each fault of faults.py in a copy of the tree, and see whether its tests notice.

    python tests/mutants/run.py                 all; `make mutants`
    python tests/mutants/run.py --check         only whether each fault's text is found once
    python tests/mutants/run.py zero_grad eps   those that have one of these words in their texts

Exit code 1 where a fault survives, or its text is not found exactly once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
PARTS = ["lorax", "kernels", "tests", "benchmarks", "configs", "docs", "pyproject.toml"]
PARTS += ["README.md", "Makefile", "constraints.txt"]
PRELOADED = ["torch", "transformers", "transformers.trainer", "peft", "bitsandbytes", "hypothesis"]
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


def preload() -> None:
    """Import once what each run of the tests needs, as tests/conftest.py would; never lorax."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)


def tests_fail(tree: Path, arguments: str) -> tuple[bool, str]:
    """Run the tests over the copy, in a fork: whether one fails, and its name."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            _run_pytest(tree, arguments, said.fileno())
        end = time.monotonic() + FAULT_SECONDS
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True, "it hangs"
            time.sleep(0.1)
        said.seek(0)
        lines = said.read().splitlines()
    code = os.waitstatus_to_exitcode(status[1])
    if code not in (0, 1):  # no tests, or a wrong argument
        raise ValueError(f"{arguments}: pytest's exit code is {code}")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return code == 1, failed[0].split(" - ")[0] if failed else ""


def _run_pytest(tree: Path, arguments: str, output: int) -> NoReturn:
    code = 99
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(tree))
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
        code = int(pytest.main([*options, *shlex.split(arguments)]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def plant(fault: Fault, tree: Path) -> tuple[bool, str]:
    """Whether the tests notice, and which."""
    path = home(fault, tree)
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    try:
        return tests_fail(tree, fault.tests)
    finally:
        path.write_text(whole)


def noticed(fault: Fault, tree: Path, clean: dict[str, bool]) -> tuple[bool, str]:
    """Whether the fault is caught, and a line's end about it.

    clean: tests -> whether they pass where nothing is planted; filled here.
    """
    try:
        if fault.tests not in clean:
            clean[fault.tests] = not tests_fail(tree, fault.tests)[0]
        if not clean[fault.tests]:
            return False, f"NOT PLANTED: {fault.tests} fails anyway"
        caught, name = plant(fault, tree)
    except ValueError as error:
        return False, f"NOT PLANTED: {error}"
    return caught, f"caught by {name}" if caught else f"SURVIVED {fault.tests}"


def plant_all(faults: list[Fault]) -> int:
    """Plant one after the other, a line each; how many were not caught."""
    preload()
    left = 0
    clean: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="lorax-mutants-") as folder:
        copy_tree(Path(folder))
        for fault in faults:
            start = time.perf_counter()
            caught, words = noticed(fault, Path(folder), clean)
            left += not caught
            print(f"{time.perf_counter() - start:6.1f} s  {fault.why}: {words}", flush=True)
    return left


def main() -> int:
    """Parse, check, plant, count."""
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
    left = plant_all(faults)
    print(f"{len(faults) - left} of {len(faults)} faults caught")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
