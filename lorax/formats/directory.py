"""Writing a directory so that a reader sees all of it or nothing.

The files go into a hidden directory beside the target; each is flushed to the disk; then one rename
puts it in place. Where the target is there already, its files are replaced one by one, each by a
rename. What goes wrong on the way (a full disk, a missing permission) leaves no litter, and the
target as it was.

A target that is a link to a directory, a mount (a container's volume), or lies where nobody may
write cannot be renamed over, and what lies beside it may be on another disk. There the hidden
directory is inside the target, and its files move up one by one, config files last: a directory
without them is taken for no model and no adapter.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorax.errors import EnvironmentProblem, UsageError


@contextmanager
def written_directory(target: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Give a directory to write into; on leaving, it becomes `target`.

    Args:
        target: may be missing or empty, a link to a directory, or a mount; with `replace` it may
            hold files, and those of the same names are replaced. `~` stands for one's home.
        replace: see above.

    Raises:
        UsageError: `target` is a file, or a directory with something in it and no `replace`.
        EnvironmentProblem: the disk is full or refuses.
    """
    target = Path(target).expanduser()
    if not replace or not target.is_dir():
        check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        home = _same_disk(target)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=home))
    except OSError as error:
        raise EnvironmentProblem(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        _settle(temporary)
        _move(temporary, target, home)
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(f"{target}: could not be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path) -> None:
    """Refuse a path where something is already; a missing or empty directory is free.

    `lost+found`, which lies in each new file system, counts as nothing.

    Raises:
        UsageError: see above.
    """
    target = target.expanduser()
    if (target.is_symlink() or target.exists()) and not target.is_dir():
        raise UsageError(f"{target}: is a file; expected a directory to write")
    if target.is_dir() and any(path.name != "lost+found" for path in target.iterdir()):
        raise UsageError(f"{target}: is not empty; choose another directory or remove it")


def _same_disk(target: Path) -> Path:
    """Where to write so that a rename leads into the target: beside it, or inside."""
    if not target.is_dir():
        return target.parent
    is_fixed = target.is_symlink() or target.is_mount() or not os.access(target.parent, os.W_OK)
    return target if is_fixed else target.parent


def _settle(directory: Path) -> None:
    """Give all below the usual mode (mkdtemp and safetensors leave 0600) and flush it."""
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            _sync(path)
    _sync(directory)


def _move(temporary: Path, target: Path, home: Path) -> None:
    if target.exists() and any(target.iterdir()):  # in there may be no more than `temporary`
        _replace_files(temporary, target, home)
        _sync(target)
    else:
        os.rename(temporary, target)
    _sync(target.parent)


def _replace_files(temporary: Path, target: Path, home: Path) -> None:
    """Move each file over the one of its name; where one fails, put the old ones back."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=home) as aside:
        new = sorted((path.name for path in temporary.iterdir()), key=_configs_last)
        for name in new:
            if (target / name).exists():
                shutil.copy2(target / name, aside)
        moved = []
        try:
            for name in new:
                moved.append(name)
                os.replace(temporary / name, target / name)
        except BaseException:
            for name in moved:
                if (Path(aside) / name).exists():
                    shutil.move(Path(aside) / name, target / name)
                else:
                    (target / name).unlink(missing_ok=True)
            raise


def _configs_last(name: str) -> tuple[bool, str]:
    return name in ("config.json", "adapter_config.json"), name


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
