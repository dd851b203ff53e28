"""Writing a directory so that a reader sees all of it or nothing.

The files go into a hidden directory beside the target; each is flushed to the disk; then one rename
puts it in place. Where the target is there already, its files are replaced one by one, each by a
rename. What goes wrong on the way (a full disk, a missing permission) leaves no litter, and the
target as it was.
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
        target: may be missing or empty; with `replace` it may hold files, and those of the same
            names are replaced.
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
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    except OSError as error:
        raise EnvironmentProblem(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        _settle(temporary)
        _move(temporary, target)
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(f"{target}: could not be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path) -> None:
    """Refuse a path where something is already; a missing or empty directory is free.

    Raises:
        UsageError: see above.
    """
    target = target.expanduser()
    if (target.is_symlink() or target.exists()) and not target.is_dir():
        raise UsageError(f"{target}: is a file; expected a directory to write")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target}: is not empty; choose another directory or remove it")


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


def _move(temporary: Path, target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        _replace_files(temporary, target)
        _sync(target)
    else:
        os.rename(temporary, target)
    _sync(target.parent)


def _replace_files(temporary: Path, target: Path) -> None:
    """Move each file over the one of its name; where one fails, put the old ones back."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as aside:
        new = sorted(path.name for path in temporary.iterdir())
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
