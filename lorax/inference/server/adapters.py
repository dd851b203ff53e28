"""Model names: the base's, and those of the adapters in one directory.

A name is the client's; under it stands a key of the engine's, a new one each time. So a name that
is unloaded is free at once, whatever answers of it are still under way, and an adapter that was
trained further can be loaded again under its name.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorax.data.tokenizer import Tokenizer
from lorax.errors import LoraxError, UsageError
from lorax.formats.adapter_tokenizer import load_adapter_tokenizer
from lorax.formats.peft_directory import find_adapter, is_adapter
from lorax.inference.server.engine import Engine

log = logging.getLogger("lorax")
Found = TypeVar("Found")

_LONGEST_NAME = 256


@dataclass(frozen=True)
class Served:
    """A model by its name: the base, whose key is None, or an adapter.

    created: when it was loaded, in seconds since 1970.
    """

    name: str
    key: str | None
    tokenizer: Tokenizer
    created: int
    directory: Path | None = None


class Models:
    """What can be asked for by name.

    base: its path, which is its name, too; where it is a directory, so is the last part of it.
    directory: the adapters'; no file outside of it is ever opened. None: there are none, and none
    can be loaded.
    """

    def __init__(self, engine: Engine, base: str, tokenizer: Tokenizer, directory: Path | None):
        self.engine = engine
        self.directory = None if directory is None else directory.resolve()
        self.base = Served(base, None, tokenizer, int(time.time()))
        self._adapters: dict[str, Served] = {}
        self._numbers = itertools.count()
        self._one_at_a_time = threading.Lock()

    def all(self) -> list[Served]:
        """The base first."""
        return [self.base, *self._adapters.values()]

    def find(self, name: str) -> Served | None:
        """The one of that name."""
        if name == self.base.name:
            return self.base
        is_short = name == Path(self.base.name).name and Path(self.base.name).exists()
        return self._adapters.get(name) or (self.base if is_short else None)

    def load_all(self) -> None:
        """Every sub-directory that is an adapter, by its name; the log names what cannot be had."""
        if self.directory is None:
            return
        for folder in sorted(self.directory.iterdir()):
            try:
                if folder.is_dir() and is_adapter(folder):
                    self.load(folder.name, folder.name)
            except LoraxError as error:
                log.warning("%s is not served: %s", folder.name, error)

    def load(self, name: str, path: str, in_place: bool = False) -> Served:
        """Serve an adapter under this name; in_place: also where the name is taken by another.

        Raises:
            UsageError: a name or path that is none, or taken, or outside of the directory.
            LoraxError: as `lorax.load_adapter`.
        """
        with self._one_at_a_time:
            self._check_name(name, in_place)
            folder = self._inside(path)
            tokenizer = load_adapter_tokenizer(folder, self.base.name)
            key = f"{next(self._numbers)}: {name}"
            self._between_rounds(lambda: self.engine.adapters.load(key, folder))
            before = self._adapters.get(name)
            served = Served(name, key, tokenizer, int(time.time()), folder)
            self._adapters[name] = served
            if before is not None:
                self._retire(before)
        return served

    def unload(self, name: str) -> bool:
        """Serve it no more; answers under way get their end. Whether there was such an adapter."""
        with self._one_at_a_time:
            served = self._adapters.pop(name, None)
            if served is not None:
                self._retire(served)
        return served is not None

    def _retire(self, served: Served) -> None:
        key = served.key
        assert key is not None
        self._between_rounds(lambda: self.engine.retire(key))

    def _between_rounds(self, function: Callable[[], Found]) -> Found:
        return self.engine.call(function).result()

    def _check_name(self, name: str, in_place: bool) -> None:
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise UsageError(
                f"lora_name has {len(name)} characters; expected 1 to {_LONGEST_NAME} that can be "
                "printed; give another name"
            )
        if name == self.base.name or (name in self._adapters and not in_place):
            raise UsageError(
                f"the name {name!r} has already been loaded; expected a free one; unload it first"
            )

    def _inside(self, path: str) -> Path:
        """The adapter's directory: below `directory`, also where links lead elsewhere."""
        if self.directory is None:
            raise UsageError(
                "adapters are loaded from --adapters DIR alone, which was not given; start the "
                "server with it"
            )
        try:
            folder = Path(os.path.realpath(self.directory / path))
            inside = folder != self.directory and folder.is_relative_to(self.directory)
            if ".." not in Path(path).parts and inside and folder.is_dir():
                found = Path(os.path.realpath(find_adapter(folder)))
                if found.is_relative_to(self.directory):
                    return found
        except (ValueError, OSError):  # a null character, a name that is too long
            pass
        raise UsageError(
            f"lora_path {path[:_LONGEST_NAME]!r}: no adapter; expected one below --adapters DIR, "
            "by its path from there"
        )
