"""Writing a directory so that a reader sees all of it or nothing.

The files go into a hidden directory beside the target; each is flushed to the disk; then one rename
puts it in place. Where the target is there already, the hidden directory gets links to the files
that stay, and the two change places in one step. What goes wrong on the way (a full disk, a missing
permission, a killed process) leaves the target as it was; litter goes with the next write.

A target that is a link to a directory, a mount (a container's volume), or lies where nobody may
write cannot be renamed over, and what lies beside it may be on another disk. There the hidden
directory is inside the target, and its files move up one by one. The config files go first and come
last: a directory without them is taken for no model and no adapter, so that a process that is
killed in between never leaves a new config over old tensors.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorax.errors import EnvironmentProblem, UsageError
from lorax.formats.exchange import exchange
from lorax.formats.litter import hidden_directory

CONFIGS = ("config.json", "adapter_config.json")


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
        with hidden_directory(target.name, home) as temporary:
            yield temporary
            _settle(temporary)
            _move(temporary, target, home)
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(
            f"{target}: could not be written ({error}); make room there, or give another path"
        ) from None


def check_free(target: Path) -> None:
    """Refuse a path where something is already; a missing or empty directory is free.

    `lost+found`, which lies in each new file system, counts as nothing.

    Raises:
        UsageError: see above.
    """
    target = target.expanduser()
    if (target.is_symlink() or target.exists()) and not target.is_dir():
        raise UsageError(f"{target}: is a file; expected a directory to write; give another path")
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
        if not _change_places(temporary, target):
            _replace_files(temporary, target, home)
            _sync(target)
    else:
        os.rename(temporary, target)
    _sync(target.parent)


def _change_places(new: Path, old: Path) -> bool:
    """Swap the two, after linking into the new one what stays; False where that cannot be done.

    Linked are files; a directory in the old one cannot be in both.
    """
    stay = [path for path in old.iterdir() if not (new / path.name).exists()]
    if new.parent == old or any(path.is_dir() and not path.is_symlink() for path in stay):
        return False
    linked = []
    try:
        for path in stay:
            os.link(path, new / path.name, follow_symlinks=False)
            linked.append(new / path.name)
        new.chmod(old.stat().st_mode & 0o7777)
        _sync(new)
        if exchange(new, old):
            return True
    except (OSError, NotImplementedError):  # no links on that disk; its files are not ours to link
        pass
    for path in linked:
        path.unlink()
    return False


def _replace_files(temporary: Path, target: Path, home: Path) -> None:
    """Move each file over the one of its name; where one fails, put the old ones back."""
    new = sorted((path.name for path in temporary.iterdir()), key=_configs_last)
    configs = [name for name in new if name in CONFIGS and (target / name).exists()]
    with hidden_directory(target.name, home) as aside:
        for name in new:
            if (target / name).exists():
                shutil.copy2(target / name, aside)
        touched = []
        try:
            for name in configs:
                touched.append(name)
                (target / name).unlink()
            _sync(target)
            for name in new:
                touched.append(name)
                os.replace(temporary / name, target / name)
        except BaseException:
            for name in dict.fromkeys(reversed(touched)):
                if (aside / name).exists():
                    shutil.move(aside / name, target / name)
                else:
                    (target / name).unlink(missing_ok=True)
            raise


def _configs_last(name: str) -> tuple[bool, str]:
    return name in CONFIGS, name


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
