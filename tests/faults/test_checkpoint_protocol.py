"""The save protocol at each of its crash points, and damage found wherever it is."""

import shutil

import pytest
from crashing_disk import RecordingDisk, replay

from lorax.errors import EnvironmentProblem, FormatError
from lorax.formats.disk import Disk
from lorax.training.checkpoint import (
    check_checkpoint,
    clear_litter,
    newest_checkpoint,
    rotate,
    write_checkpoint,
)


def files(step):
    """Two small files whose content tells the step."""
    return {
        "state.json": lambda path: path.write_text(f'{{"step": {step}}}'),
        "trained.safetensors": lambda path: path.write_bytes(bytes([step]) * 40),
    }


def saved(path):
    return (path / "trained.safetensors").read_bytes()


def a_run_of_saves(root):
    """Steps 1 to 4 with rotation to two, recorded; how many operations each save took."""
    disk, done = RecordingDisk(root), []
    checkpoints = root / "checkpoints"
    for step in (1, 2, 3, 4):
        write_checkpoint(checkpoints, step, files(step), disk)
        done.append((len(disk.operations), step))
        rotate(checkpoints, 2, disk)
    return disk.operations, done


@pytest.mark.parametrize("lost", ["nothing", "content", "half", "names", "all"])
def test_at_every_crash_point_the_newest_complete_checkpoint_loads(tmp_path, lost):
    (tmp_path / "real").mkdir()
    operations, done = a_run_of_saves(tmp_path / "real")
    assert len(operations) > 40
    for count in range(len(operations) + 1):
        root = tmp_path / f"crash-{count}"
        root.mkdir()
        replay(operations[:count], root, lost=lost)
        finished = [step for end, step in done if end <= count]
        found = newest_checkpoint(root / "checkpoints")
        if finished:
            assert found is not None, f"behind operation {count}"
            assert int(found.name[5:]) >= finished[-1]
        if found is not None:
            check_checkpoint(found)
            assert saved(found) == bytes([int(found.name[5:])]) * 40
        shutil.rmtree(root)


def test_the_protocol_without_its_flush_would_be_caught(tmp_path):
    """The enumeration above can fail: leave the flush of the files out, and it does."""

    class Forgetful(RecordingDisk):
        def sync(self, path):
            if path.is_dir():
                super().sync(path)

    (tmp_path / "real").mkdir()
    disk = Forgetful(tmp_path / "real")
    write_checkpoint(tmp_path / "real" / "checkpoints", 1, files(1), disk)
    (tmp_path / "after").mkdir()
    replay(disk.operations, tmp_path / "after", lost="content")
    assert newest_checkpoint(tmp_path / "after" / "checkpoints") is None


def test_a_save_goes_on_behind_every_crash_point(tmp_path):
    """What a crash left lying about is no obstacle, and is cleared."""
    (tmp_path / "real").mkdir()
    operations, _ = a_run_of_saves(tmp_path / "real")
    for count in range(len(operations) + 1):
        root = tmp_path / f"crash-{count}"
        root.mkdir()
        replay(operations[:count], root, lost="content")
        clear_litter(root / "checkpoints")
        write_checkpoint(root / "checkpoints", 5, files(5))
        rotate(root / "checkpoints", 1)
        assert newest_checkpoint(root / "checkpoints").name == "step-00000005"
        names = {p.name for p in (root / "checkpoints").iterdir()}
        assert not any(name.startswith(".tmp") for name in names)
        shutil.rmtree(root)


def test_one_changed_bit_anywhere_is_found(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoints", 7, files(7))
    check_checkpoint(path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in range(len(whole)):
            for bit in (0, 5, 7):
                changed = bytearray(whole)
                changed[position] ^= 1 << bit
                file.write_bytes(bytes(changed))
                if file.name == "manifest.json" and _means_the_same(whole, bytes(changed)):
                    continue
                with pytest.raises(FormatError):
                    check_checkpoint(path)
        file.write_bytes(whole)
    check_checkpoint(path)


def _means_the_same(one, two):
    """JSON's white space may change without a change of meaning."""
    import json

    try:
        return json.loads(one) == json.loads(two)
    except ValueError:
        return False


def test_each_missing_end_is_found(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoints", 7, files(7))
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        ends = len(whole.rstrip()) if file.name == "manifest.json" else len(whole)
        for length in range(ends):
            file.write_bytes(whole[:length])
            with pytest.raises(FormatError):
                check_checkpoint(path)
        file.write_bytes(whole)


@pytest.mark.parametrize("harm", ["missing", "more", "other name"])
def test_files_too_few_or_too_many_are_found(tmp_path, harm):
    path = write_checkpoint(tmp_path / "checkpoints", 7, files(7))
    if harm == "missing":
        (path / "state.json").unlink()
    elif harm == "more":
        (path / "stranger").write_text("")
    else:
        path = path.rename(path.with_name("step-00000008"))
    with pytest.raises(FormatError):
        check_checkpoint(path)


def test_a_damaged_newest_one_is_named_and_the_one_before_it_taken(tmp_path, caplog):
    for step in (3, 6):
        path = write_checkpoint(tmp_path / "checkpoints", step, files(step))
    (path / "trained.safetensors").write_bytes(b"x")
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000003"
    assert "step-00000006" in caplog.text


def test_a_damaged_one_is_moved_aside_before_its_step_is_saved_again(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    path = write_checkpoint(checkpoints, 3, files(3))
    (path / "trained.safetensors").write_bytes(b"x")
    write_checkpoint(checkpoints, 3, files(3))
    check_checkpoint(checkpoints / "step-00000003")
    assert (checkpoints / "damaged-step-00000003-1" / "trained.safetensors").read_bytes() == b"x"


def test_rotation_never_removes_the_last_complete_one(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        path = write_checkpoint(checkpoints, step, files(step))
        if step > 1:
            (path / "manifest.json").unlink()
    rotate(checkpoints, 1)
    assert newest_checkpoint(checkpoints).name == "step-00000001"


@pytest.mark.parametrize("failing", ["make_directory", "write", "sync", "rename"])
def test_a_disk_that_refuses_leaves_no_litter_and_the_one_before(tmp_path, failing):
    class Full(Disk):
        def make_directory(self, path):
            self._maybe("make_directory")
            super().make_directory(path)

        def write(self, path, writer):
            super().write(path, writer)
            self._maybe("write")

        def sync(self, path):
            self._maybe("sync")
            super().sync(path)

        def rename(self, source, target):
            self._maybe("rename")
            super().rename(source, target)

        def _maybe(self, what):
            if what == failing:
                raise OSError(28, "No space left on device")

    checkpoints = tmp_path / "checkpoints"
    write_checkpoint(checkpoints, 1, files(1))
    with pytest.raises(EnvironmentProblem, match="No space left"):
        write_checkpoint(checkpoints, 2, files(2), Full())
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000001"]
    check_checkpoint(checkpoints / "step-00000001")
