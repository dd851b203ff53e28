"""The program `lorax`: its app, and what becomes of errors.

Exit codes: 0 ok, 1 a check does not hold, 2 usage or recipe, 3 environment or disk, 4 data or
files, 5 numerical stop, 130 / 143 signals.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError

from lorax.cli.plugins import take_plugins
from lorax.cli.terminal import err, say_error
from lorax.console import ConsoleLog
from lorax.errors import LoraxError, UsageError
from lorax.version import __version__

app = App(
    name="lorax",
    version=__version__,
    help="LoRA and QLoRA from scratch: small enough to read, exact enough to trust. Each command "
    "takes --plugin FILE.py: your own file, executed first, which registers variants and the like.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


def main() -> None:
    """Run the command line; every error that a user can cause is one line on stderr."""
    # Read when torch is imported, which is later. OpenMP's threads spin while they wait for each
    # other: beside another busy program a product then takes thirty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not logging.getLogger("lorax").handlers:
        logging.getLogger("lorax").addHandler(ConsoleLog(err))
    try:
        rest = take_plugins(sys.argv[1:])
        command, given, _ = app.parse_args(rest, exit_on_error=False, print_error=False)
        named = {name: _at_home(value) for name, value in given.kwargs.items()}
        command(*map(_at_home, given.args), **named)
    except (CycloptsError, LoraxError) as error:
        say_error(error, "error: ")
        sys.exit(error.exit_code if isinstance(error, LoraxError) else UsageError.exit_code)
    except KeyboardInterrupt as interrupt:
        line = ": ".join(["interrupted", *map(str, interrupt.args)])
        say_error(line)
        sys.exit(getattr(interrupt, "exit_code", 130))
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        sys.exit(0)


def _at_home(value: Any) -> Any:
    """A path, or several, with "~" for the home directory written out."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return value.expanduser() if isinstance(value, Path) else value
