"""What must not be done in the tests' own process, in a fork of it: no seconds of imports."""

import json
import os
import traceback
from collections.abc import Callable
from typing import Any


def in_a_fork(function: Callable[[], Any]) -> Any:
    """What the function gives there, as JSON has it.

    Raises:
        AssertionError: it failed, with its traceback.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = json.dumps({"gave": function()})
        except BaseException:
            said = json.dumps({"failed": traceback.format_exc()})
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        found = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert "gave" in found, found["failed"]
    return found["gave"]
