"""The command line in this process: seconds less than a process of its own."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from lorax import cli


def run_lorax(*arguments: Any, code: int = 0) -> str:
    """Run a command that must end with this exit code; what it printed."""
    done = complete_lorax(*arguments)
    said = f"{done.stderr}\n{done.stdout}"
    assert done.returncode == code, f"{' '.join(done.args)}: exit code {done.returncode}\n{said}"
    return done.stdout


def complete_lorax(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command, in a directory; as `subprocess.run` with text would give it."""
    out, err = io.StringIO(), io.StringIO()
    argv, found = ["lorax", *map(str, arguments)], 0
    try:
        with (
            contextlib.chdir(cwd or Path.cwd()),
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as stop:
        found = int(stop.code or 0)
    return subprocess.CompletedProcess(argv, found, out.getvalue(), err.getvalue())
