"""Where the commands print: results on stdout, remarks on stderr."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from lorax.console import PlainConsole

out = PlainConsole()
err = PlainConsole(stderr=True)

# torchrun starts several: one speaks, and torchrun ends the others soon after it has failed. So an
# error of all is said once, and one that only another process has is still said.
_RANK = int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
_UNTIL_TORCHRUN_ENDS_ALL = 5.0  # seconds


def say_error(error: BaseException | str, start: str = "") -> None:
    """An error in one line, on stderr."""
    if _RANK:
        time.sleep(_UNTIL_TORCHRUN_ENDS_ALL)
        start = f"process {_RANK}: {start}"
    err.say_line(error, start)


def say(text: str) -> None:
    """A line of the result, not wrapped; of several processes, the first one's."""
    if not _RANK:
        out.print(text, soft_wrap=True)


def tell(text: str) -> None:
    """A line beside the results: on stderr, so that what reads stdout gets results alone."""
    err.print(text, style="dim", soft_wrap=True)


def warn(text: str) -> None:
    """A warning, on stderr."""
    err.say_line(text, "warning: ")


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
