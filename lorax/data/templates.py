"""Chat templates: a program from a stranger's file, run where it can do no harm.

A chat template is Jinja source that comes with a model. lorax renders it in a process of its own:

    parent                                    worker (python -m lorax.data.template_worker)
    {"source", "variables"}   -- a line -->   jinja2's immutable sandbox, limited memory
    {"text", "spans"}         <-- a line --   or {"error"}

so that a loop without end is stopped by the clock, and a string without end by the memory limit;
neither is possible inside the process that trains. The worker imports jinja2 and nothing of torch,
starts with the first rendering (about 0.1 s), and serves all that follow.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorax.errors import TemplateError

MAX_SOURCE_CHARACTERS = 2**20
MAX_SECONDS = 5.0  # a rendering takes well under a millisecond
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    spans: [start, end) in characters of what `{% generation %}` marks: what the assistant says.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """One template, ready to be rendered."""

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"chat template: {len(source)} characters; at most {MAX_SOURCE_CHARACTERS}"
                "; give a shorter one"
            )
        self.source = source

    def render(self, **variables: Any) -> Rendered:
        """Render with these variables.

        Raises:
            TemplateError: a syntax error, what Jinja refuses to do with a missing name, something
                that the sandbox forbids, the template's own raise_exception, or too much time,
                memory or output.
        """
        answer = _worker.ask({"source": self.source, "variables": variables})
        if "error" in answer:
            raise TemplateError(
                f"chat template: {answer['error']}; mend the messages or the template"
            )
        return Rendered(answer["text"], tuple((start, end) for start, end in answer["spans"]))


def as_templates_see(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to a template: nulls left out, reasoning by each name.

    Templates look for keys that are not there, and print a null as "None". An answer's reasoning
    is kept under one of three names; gpt-oss's template reads the second, all others the first.
    """
    seen = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        found = next((message[name] for name in REASONING if name in message), None)
        if found is not None:
            message = {"thinking": found, **message, "reasoning_content": found}
        seen.append(message)
    return seen


class _Worker:
    """The rendering process: started when needed, stopped for good when it overstays."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line, wait for one line."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            except (TypeError, ValueError, RecursionError) as error:
                raise TemplateError(
                    f"chat template: not plain data ({error})"
                    "; give text, numbers, lists and objects only"
                ) from None
            except OSError:
                return self._stopped("its process ended")
            try:
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    if not selector.select(MAX_SECONDS):
                        return self._stopped(f"took longer than {MAX_SECONDS:g} seconds")
                line = process.stdout.readline()
            except BaseException:  # Ctrl-C: its answer must not become the next question's
                self._stopped("was interrupted")
                raise
            if not line.endswith("\n"):
                return self._stopped("used too much memory")
            return json.loads(line)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lorax.data.template_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C belongs to the parent
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline() != "ready\n":
                raise TemplateError(
                    "chat template: the rendering process did not start"
                    "; free some memory and try again"
                )
        return self._process

    def _stopped(self, reason: str) -> dict[str, Any]:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what it never read cannot be flushed
                        stream.close()
            self._process = None
        return {"error": f"{reason} and was stopped"}


_worker = _Worker()
