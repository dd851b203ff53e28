"""Regular expressions of an adapter's config, matched in bounded time.

They are programs of a stranger's, and run in a process that can be stopped (expression_worker.py).
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
from pathlib import Path

from lorax.adapters import expression_worker
from lorax.adapters.matching import Groups, is_plain
from lorax.errors import AdapterError

MAX_CHARACTERS = 20_000  # of an expression; those that people write have at most a thousand
MAX_SECONDS = 20.0  # on the clock, for a machine that is very busy; computing has less


def check_expression(expression: str, whole: str | None = None) -> None:
    """Refuse what is no regular expression, by itself and inside of `whole`.

    Raises:
        AdapterError: see above, or it is too long.
    """
    if is_plain(expression):
        return
    if len(expression) > MAX_CHARACTERS:
        raise AdapterError(
            f"{expression[:60]!r}... has {len(expression)} characters; a regular expression may "
            f"have {MAX_CHARACTERS}; write a shorter one, or a list of names"
        )
    for each in (expression, whole or expression):
        problem = _ask(each, None, False).get("error")
        if problem is not None:
            raise AdapterError(
                f"{expression!r} is no regular expression ({problem}); write it as Python's re does"
            )


def groups(expression: str, name: str, full: bool) -> Groups | None:
    """The groups of `re.fullmatch` (`full`) or `re.match`; None where there is no match.

    Raises:
        AdapterError: it is no expression, or takes too long.
    """
    reply = _ask(expression, name, full)
    if "error" in reply:
        problem = reply["error"]
        raise AdapterError(
            f"{expression!r} is no regular expression ({problem}); write it as Python's re does"
        )
    return None if reply["groups"] is None else tuple(reply["groups"])


def _ask(expression: str, text: str | None, full: bool) -> dict[str, list[str | None] | None]:
    try:
        return _worker.ask({"expression": expression, "text": text, "full": full})
    except OSError:
        raise AdapterError(
            f"{expression[:200]!r} takes more than {expression_worker.STOCK:g} s to match against "
            "the model's names; write it without repeats inside of repeats, or list the names"
        ) from None


class _Worker:
    """The matching process: started when needed, gone where a question took too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, question: dict[str, str | bool | None]) -> dict[str, list[str | None] | None]:
        """Send one line, wait for one line.

        Raises:
            OSError: the process ended over it.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    line = process.stdout.readline() if selector.select(MAX_SECONDS) else ""
            except BaseException:  # Ctrl-C: its answer must not become the next question's
                self._stop()
                raise
            if not line.endswith("\n"):
                self._stop()
                raise OSError("the matching process ended")
            reply: dict[str, list[str | None] | None] = json.loads(line)
            return reply

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(expression_worker.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C belongs to the parent
            )
        return self._process

    def _stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it never read cannot be flushed
                    stream.close()
        self._process = None


_worker = _Worker()
