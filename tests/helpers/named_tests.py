"""Tests that a text names as file::test."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def named_in(text):
    """The names in it, in their order."""
    return re.findall(r"test_\w+::test_\w+", text)


def is_there(name):
    """Whether a file of that name, in any folder, has the test."""
    file, _, test = name.partition("::")
    (path,) = TESTS.rglob(f"{file}.py")
    return re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE) is not None
