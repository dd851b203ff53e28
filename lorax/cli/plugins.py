"""--plugin FILE.py, wherever it stands on the command line."""

from __future__ import annotations

from pathlib import Path

from lorax.errors import UsageError
from lorax.plugins import load_plugin

given_plugins: list[Path] = []  # by --plugin, in this call; a run's config.toml names them too


def take_plugins(arguments: list[str]) -> list[str]:
    """Execute what --plugin names, and give the other arguments."""
    given_plugins.clear()
    rest, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name != "--plugin":
            rest.append(argument)
            continue
        if not equals and not waiting:
            raise UsageError("--plugin: expected a Python file behind it")
        given_plugins.append(Path(value if equals else waiting.pop(0)).expanduser())
    for plugin in given_plugins:
        load_plugin(plugin)
    return rest
