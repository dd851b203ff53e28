"""The process that renders chat templates: a line of JSON in, a line of JSON out.

Its own memory is limited before the first template is read; its time is the parent's to limit.
"""

import datetime
import functools
import json
import secrets
import sys
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 512 * 2**20
MAX_OUTPUT_CHARACTERS = 4 * 2**20
_MARK = secrets.token_hex(16)  # brackets the assistant's words; no template can guess it
_OPEN, _CLOSE = f"<{_MARK}>", f"</{_MARK}>"


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> nodes.Node:
        """Wrap the body in a call that brackets its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def environment() -> Environment:
    """Jinja as chat templates expect it: transformers' settings, filters and functions.

    A name that is missing prints as nothing, and what is asked of it is an error, as there.
    """

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        autoescape=False,
    )
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env


@functools.lru_cache(maxsize=8)
def compiled(env: Environment, source: str) -> Template:
    """The template, compiled once: that takes 5 ms, and a rendering 0.1."""
    return env.from_string(source)


def render(env: Environment, source: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Render to {"text", "spans"}, or say in {"error"} why not."""
    pieces = []
    size = 0
    try:
        given = {"tools": None, "documents": None, **variables}
        for piece in compiled(env, source).generate(**given):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARACTERS:
                return {"error": f"gives more than {MAX_OUTPUT_CHARACTERS} characters"}
    except MemoryError:
        return {"error": "used too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return unbracket("".join(pieces))


def unbracket(marked: str) -> dict[str, Any]:
    """Take the brackets out and say where they stood."""
    text, spans = "", []
    head, *rest = marked.split(_OPEN)
    text = head
    for part in rest:
        inside, _, outside = part.partition(_CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return {"text": text, "spans": spans}


def limit_memory() -> None:
    """Ask the system to end this process where it grows too large (where a system can)."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit; the clock still holds


def main() -> None:
    """Serve until the parent closes the pipe."""
    limit_memory()
    env = environment()
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer = render(env, question["source"], question["variables"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
