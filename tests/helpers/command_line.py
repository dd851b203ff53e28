"""The command line in this process: seconds less than a process of its own."""

import contextlib
import io
import sys
from typing import Any
from unittest import mock

from lorax import cli


def run_lorax(*arguments: Any, code: int = 0) -> str:
    """Run a command that must end with this exit code; what it printed."""
    out, err = io.StringIO(), io.StringIO()
    argv, found = ["lorax", *map(str, arguments)], 0
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as stop:
        found = stop.code or 0
    assert found == code, f"{' '.join(argv)}: exit code {found}\n{err.getvalue()}\n{out.getvalue()}"
    return out.getvalue()
