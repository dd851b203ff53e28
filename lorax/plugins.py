"""A user's own Python file, executed once: it registers variants, codebooks, models, step hooks.

    lorax train recipe.toml --plugin mine.py            or in the recipe: plugins = ["mine.py"]

It is executed with all the rights of the process, as `python mine.py` would be. So only what the
user names on the command line or in a recipe is; nothing that lies in a model's or an adapter's
directory ever is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from lorax.errors import LoraxError, PluginError
from lorax.files import require
from lorax.text import one_line

_loaded: dict[Path, ModuleType] = {}


def load_plugin(path: str | Path) -> ModuleType:
    """Execute a Python file, the first time that this process is asked to.

    Raises:
        EnvironmentProblem: no such file. PluginError: it is no Python file, or it fails; the
            message has the line.
    """
    file = require(path).resolve()
    if file in _loaded:
        return _loaded[file]
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"{path}: expected a Python file, NAME.py")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"lorax_plugin_{digest}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[spec.name]
        raise PluginError(f"{path}: {_what_failed(error, file)}") from error
    _loaded[file] = module
    return module


def where_it_failed(error: Exception) -> str:
    """ "file:line: kind: message" of what a function raised that the caller's own frame called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = frames[min(1, len(frames) - 1)]  # frames[0] is the caller
    return f"{own.filename}:{own.lineno}: {type(error).__name__}: {error}"


def _what_failed(error: Exception, file: Path) -> str:
    """The error in one line, with the line of the plugin that it came from."""
    if isinstance(error, LoraxError):
        return one_line(error)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    where = f"line {line}: " if line else ""
    return f"{where}{type(error).__name__}: {one_line(error)}"
