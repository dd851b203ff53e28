"""A disk whose power fails: what the save protocol did up to some point, less what was not flushed.

`RecordingDisk` works on the real file system and keeps a list of what it did. `replay` does the
first operations of that list once more in another directory, as a machine finds them after losing
power: a file that was written but not flushed is there empty or cut in half; a rename or a new file
whose directory was not flushed may be there or not.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from lorax.formats.disk import Disk


@dataclass(frozen=True)
class Operation:
    kind: str  # "mkdir", "write", "sync", "rename", "remove"
    path: str  # below the root
    target: str = ""
    data: bytes = b""


class RecordingDisk(Disk):
    def __init__(self, root: Path):
        self.root = root
        self.operations: list[Operation] = []

    def _note(self, kind, path, target="", data=b""):
        relative = [str(Path(p).relative_to(self.root)) if p else "" for p in (path, target)]
        self.operations.append(Operation(kind, *relative, data))

    def make_directory(self, path):
        super().make_directory(path)
        self._note("mkdir", path)

    def write(self, path, writer):
        before = set(path.parent.iterdir())
        super().write(path, writer)
        for new in sorted(set(path.parent.iterdir()) - before | {path}):  # one may write another
            self._note("write", new, data=new.read_bytes())

    def sync(self, path):
        super().sync(path)
        self._note("sync", path)

    def rename(self, source, target):
        super().rename(source, target)
        self._note("rename", source, target)

    def remove(self, path):
        if path.exists():
            super().remove(path)
            self._note("remove", path)


def replay(operations: list[Operation], root: Path, *, lost: str) -> None:
    """Do the operations in `root`; `lost` is what becomes of what was not flushed behind them.

    lost: "nothing" (the process died, not the machine), "content" (files not flushed are empty),
        "half" (they are cut in half), "names" (renames whose directory was not flushed are undone),
        "all" (content and names).
    """
    dirty: set[str] = set()
    renames: list[Operation] = []
    for operation in operations:
        path = root / operation.path
        if operation.kind == "mkdir":
            path.mkdir(parents=True)
        elif operation.kind == "write":
            path.write_bytes(operation.data)
            dirty.add(operation.path)
        elif operation.kind == "sync":
            dirty.discard(operation.path)
            renames = [r for r in renames if str(Path(r.target).parent) != operation.path]
        elif operation.kind == "rename":
            path.rename(root / operation.target)
            dirty = {_moved(name, operation) for name in dirty}
            renames.append(operation)
        else:
            shutil.rmtree(path, ignore_errors=True)
            renames = [r for r in renames if r.target != operation.path]
    if lost in ("content", "half", "all"):
        for name in dirty:
            file = root / name
            if file.is_file():
                data = file.read_bytes()
                file.write_bytes(data[: len(data) // 2] if lost == "half" else b"")
    if lost in ("names", "all"):
        for operation in reversed(renames):
            if (root / operation.target).exists():
                (root / operation.target).rename(root / operation.path)


def _moved(name: str, rename: Operation) -> str:
    if name == rename.path or name.startswith(rename.path + "/"):
        return rename.target + name[len(rename.path) :]
    return name
