"""The process that matches a stranger's regular expressions: a line of JSON in, a line of JSON out.

    {"expression", "text", "full"}  -->  {"groups": null | [...]}  or  {"error": "..."}

Python's `re` tries every way to match, which for `([a-z]+)+!` doubles with each letter, and nothing
inside a process can stop it. Here the system's timer does: this process has a stock of seconds, a
question that takes longer than ALLOWANCE draws on it, a quicker one fills it again, and where it is
empty the process is ended. It imports nothing of lorax, and starts in 0.03 s.
"""

import functools
import json
import re
import signal
import sys
import time

STOCK = 0.5  # seconds of computing, for one question or many
ALLOWANCE = 0.0005  # what a question costs nothing; an honest one takes a hundredth of that
MAX_MEMORY_BYTES = 512 * 2**20

compiled = functools.lru_cache(maxsize=4096)(re.compile)


def answer(expression: str, text: str | None, full: bool) -> dict[str, object]:
    """What `re` says; without a text, whether the expression is one."""
    try:
        pattern = compiled(expression)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return {"error": str(error)[:200] or type(error).__name__}
    if text is None:
        return {"groups": None}
    match = pattern.fullmatch(text) if full else pattern.match(text)
    return {"groups": None if match is None else match.groups()}


def main() -> None:
    """Serve until the parent closes the pipe, or the stock of seconds is empty."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass
    timer = getattr(signal, "setitimer", None)  # Windows has none; the parent's clock still holds
    left = STOCK
    for line in sys.stdin:
        question = json.loads(line)
        if timer:
            timer(signal.ITIMER_VIRTUAL, left)  # its signal ends the process
        started = time.process_time()
        reply = answer(question["expression"], question["text"], question["full"])
        left = min(STOCK, left - (time.process_time() - started) + ALLOWANCE)
        if timer:
            timer(signal.ITIMER_VIRTUAL, 0)
        if left <= 0:
            return
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
