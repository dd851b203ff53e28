"""Where the commands print: results on stdout, remarks on stderr."""

from __future__ import annotations

import json
from typing import Any

from lorax.console import PlainConsole

out = PlainConsole()
err = PlainConsole(stderr=True)


def say(text: str) -> None:
    """A line of the result, not wrapped."""
    out.print(text, soft_wrap=True)


def tell(text: str) -> None:
    """A line beside the results: on stderr, so that what reads stdout gets results alone."""
    err.print(text, style="dim", soft_wrap=True)


def note(text: str) -> None:
    """A line for who sits before it: only where stderr is a terminal."""
    if err.is_terminal:
        err.print(text, soft_wrap=True)


def print_found(found: Any) -> None:
    """One JSON object, or lines and tables in order."""
    if isinstance(found, dict):
        print_json(found)
        return
    for part in found:
        if isinstance(part, str):
            say(part)
        else:
            out.print(part)


def print_json(value: dict[str, Any]) -> None:
    """One object, on one line."""
    print(json.dumps(value))
