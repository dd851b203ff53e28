"""A process that is killed while it replaces a directory: the old one or the new one is there."""

import os
import subprocess
import sys

import pytest

from lorax.formats.directory import written_directory

# A child for each operation in turn, killed before it; {"old" | "new" | None} for both files.
KILLED = """
import os, sys, shutil
from pathlib import Path
import lorax.formats.directory as D, lorax.formats.litter as L
root, swaps = Path(sys.argv[1]), sys.argv[2] == "swaps"
if not swaps:
    D.exchange = lambda *_: False
else:
    real = D.exchange
NAMES = ("adapter_config.json", "adapter_model.safetensors")
def state(target):
    return tuple((target / n).read_text() if (target / n).exists() else None for n in NAMES)
def fresh(home):
    shutil.rmtree(home, ignore_errors=True)
    (home / "real").mkdir(parents=True)
    for name in NAMES: (home / "real" / name).write_text("old")
    (home / "real" / "other").write_text("stays")
    (home / "link").symlink_to(home / "real")
    return home / sys.argv[3]
number, seen = 0, []
while True:
    target = fresh(root / "x")
    child = os.fork()
    if not child:
        left = [number]
        def killing(module, name):
            real = getattr(module, name)
            def act(*a, **k):
                left[0] -= 1
                if left[0] == -1: os.kill(os.getpid(), 9)
                return real(*a, **k)
            setattr(module, name, act)
        for name in ("link", "rename", "replace", "fsync", "unlink", "rmdir"): killing(os, name)
        killing(D, "exchange")
        with D.written_directory(target, replace=True) as directory:
            for n in NAMES: (directory / n).write_text("new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert (target / "other").read_text() == "stays"
    seen.append(state(target))
    with D.written_directory(target, replace=True) as directory:
        (directory / NAMES[0]).write_text("new")
    litter = [p for p in (root / "x").rglob(".tmp-*")]
    assert not litter, litter
    if status == 0: break
    number += 1
print(seen)
"""


def states(tmp_path, how, name):
    command = [sys.executable, "-c", KILLED, str(tmp_path), how, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)  # noqa: S307 - our own child's list


def test_where_directories_can_be_swapped_it_is_the_old_or_the_new_one(tmp_path):
    seen = states(tmp_path, "swaps", "real")
    assert set(seen) == {("old", "old"), ("new", "new")}
    assert len(seen) > 5


@pytest.mark.parametrize("name", ["real", "link"])
def test_elsewhere_a_new_config_never_stands_over_old_tensors(tmp_path, name):
    seen = states(tmp_path, "files", name)
    assert {("old", "old"), ("new", "new")} < set(seen)
    assert set(seen) <= {("old", "old"), (None, "old"), (None, "new"), ("new", "new")}


def test_what_another_process_is_writing_is_no_litter(tmp_path):
    with written_directory(tmp_path / "a[1]", replace=True) as mine:
        (mine / "x").write_text("1")
        left = tmp_path / ".tmp-a[1]-left"
        left.mkdir()
        other = tmp_path / ".tmp-ab-other"
        other.mkdir()
        with written_directory(tmp_path / "a[1]", replace=True) as theirs:
            (theirs / "y").write_text("2")
        assert not left.exists()
        assert mine.exists()
    assert sorted(os.listdir(tmp_path / "a[1]")) == ["x", "y"]
    assert other.exists()


def test_a_directory_inside_and_its_mode_stay(tmp_path):
    target = tmp_path / "adapter"
    for replace in (False, True):
        with written_directory(target, replace=replace) as directory:
            (directory / "x").write_text(str(replace))
        target.chmod(0o750)
    assert (target / "x").read_text() == "True"
    (target / "sub").mkdir()
    (target / "sub" / "file").write_text("1")
    with written_directory(target, replace=True) as directory:
        (directory / "x").write_text("3")
    assert (target / "x").read_text() == "3"
    assert (target / "sub" / "file").read_text() == "1"
    assert target.stat().st_mode & 0o777 == 0o750
