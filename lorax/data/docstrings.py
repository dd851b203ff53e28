"""Questions and answers from Python's own library: real text that every machine has.

"What does `posixpath.join` do?" is answered by the first paragraph of its docstring. A few
thousand such pairs come out of the modules below, which are imported for it (plain Python or C of
the standard library; they do nothing when imported). Whole modules are held out, so that evaluation
asks about functions of which no neighbour was trained on.
"""

import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TRAINING_MODULES = [
    "abc",
    "argparse",
    "array",
    "ast",
    "asyncio",
    "base64",
    "binascii",
    "bisect",
    "calendar",
    "cmath",
    "codecs",
    "collections",
    "concurrent.futures",
    "configparser",
    "contextlib",
    "contextvars",
    "copy",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "email",
    "email.message",
    "email.utils",
    "enum",
    "fileinput",
    "fnmatch",
    "fractions",
    "functools",
    "gc",
    "getpass",
    "gettext",
    "glob",
    "graphlib",
    "gzip",
    "hashlib",
    "hmac",
    "html",
    "html.parser",
    "http.client",
    "http.cookies",
    "http.server",
    "imaplib",
    "importlib",
    "inspect",
    "io",
    "ipaddress",
    "itertools",
    "json",
    "keyword",
    "linecache",
    "locale",
    "logging",
    "logging.handlers",
    "lzma",
    "mailbox",
    "marshal",
    "math",
    "mimetypes",
    "mmap",
    "multiprocessing.pool",
    "numbers",
    "operator",
    "optparse",
    "os",
    "pathlib",
    "pdb",
    "pkgutil",
    "platform",
    "plistlib",
    "poplib",
    "posixpath",
    "pprint",
    "profile",
    "pyclbr",
    "queue",
    "quopri",
    "random",
    "re",
    "reprlib",
    "rlcompleter",
    "sched",
    "secrets",
    "select",
    "selectors",
    "shelve",
    "shlex",
    "signal",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "stat",
    "string",
    "struct",
    "subprocess",
    "symtable",
    "sysconfig",
    "tabnanny",
    "tempfile",
    "threading",
    "timeit",
    "token",
    "tokenize",
    "trace",
    "traceback",
    "tracemalloc",
    "types",
    "typing",
    "unicodedata",
    "unittest",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "wsgiref.headers",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax.saxutils",
    "xmlrpc.client",
    "zlib",
]
HELD_OUT_MODULES = ("bz2", "cmd", "heapq", "ftplib", "shutil", "statistics", "textwrap", "zipfile")

QUESTION = "What does `{name}` of Python's standard library do?"
MAX_ANSWER_CHARACTERS = 400


def write_pairs(directory: Path) -> tuple[Path, Path]:
    """Write train.jsonl and held-out.jsonl, rows of messages; give their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    training = pairs(TRAINING_MODULES)
    seen = {answer for _, answer in training}
    held_out = [pair for pair in pairs(HELD_OUT_MODULES) if pair[1] not in seen]
    paths = directory / "train.jsonl", directory / "held-out.jsonl"
    for path, chosen in zip(paths, (training, held_out), strict=True):
        lines = [json.dumps(row(name, answer)) + "\n" for name, answer in chosen]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def row(name: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """A pair as a row of messages."""
    return {
        "messages": [
            {"role": "user", "content": QUESTION.format(name=name)},
            {"role": "assistant", "content": answer},
        ]
    }


def pairs(modules: tuple[str, ...] | list[str]) -> list[tuple[str, str]]:
    """(name, first paragraph of its docstring) for what these modules define, each text once."""
    found: dict[str, str] = {}
    for module_name in modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(module_name)
            except ImportError:  # not every system has every module
                continue
        for name, thing in _members(module):
            answer = _first_paragraph(thing)
            if answer is not None:
                found.setdefault(answer, name)
    return sorted((name, answer) for answer, name in found.items())


def _members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The module's public functions and classes, and the classes' public methods."""
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        if not _belongs(thing, module.__name__):
            continue
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            for method_name, method in sorted(vars(thing).items()):
                if not method_name.startswith("_") and callable(method):
                    yield f"{module.__name__}.{name}.{method_name}", method


def _belongs(thing: object, module_name: str) -> bool:
    """Whether it is defined there (or in the C module behind it), not just imported."""
    home = getattr(thing, "__module__", None) or module_name
    return home.lstrip("_").split(".")[0] == module_name.split(".")[0]


def _first_paragraph(thing: object) -> str | None:
    text = getattr(thing, "__doc__", None)
    if not isinstance(text, str):
        return None
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    # Built-in functions begin with their signature; the sentence comes behind it.
    if re.fullmatch(r"[\w.]+\(.*\).*", paragraphs[0], re.DOTALL) and len(paragraphs) > 1:
        paragraphs = paragraphs[1:]
    answer = " ".join(paragraphs[0].split())
    return answer if 20 <= len(answer) <= MAX_ANSWER_CHARACTERS else None
