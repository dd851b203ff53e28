"""The command line in this process: seconds less than a process of its own."""

import contextlib
import io
import sys
from typing import Any
from unittest import mock

from lorax import cli


def run_lorax(*arguments: Any) -> str:
    """Run a command that must end with exit code 0; what it printed."""
    out, err = io.StringIO(), io.StringIO()
    argv, code = ["lorax", *map(str, arguments)], 0
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    assert not code, f"{' '.join(argv)}: exit code {code}\n{err.getvalue()}"
    return out.getvalue()
