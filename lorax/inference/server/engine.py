"""The thread that owns the model: continuous batching.

    submit -> queue -> a slot of the batch -> a token in each round -> the answer's `send`

Between two rounds of tokens, and nowhere else, answers join and leave, adapters are loaded and
removed, and what was cancelled or is late is dropped. Each answer is what it would be alone
(lorax/inference/batch.py), so who else is answered changes nothing but its time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lorax.errors import AdapterError, LoraxError
from lorax.inference.batch import Batch, Row
from lorax.inference.named import named_adapters
from lorax.inference.server.answer import Answer
from lorax.inference.server.limits import Limits
from lorax.inference.server.queue import FairQueue
from lorax.models import Model

log = logging.getLogger("lorax")
Found = TypeVar("Found")

_MOST_STANDING = 32  # adapters that a batch is ready for; more are taken in as they are asked for


class Closed(Exception):
    """The engine takes nothing any more."""


class Full(Exception):
    """So many wait already that no more may."""


class Engine:
    """See above.

    model: on any device; from now on the engine's alone. budget: how many adapters may be in
    memory at a time; None: all. counts: what happened so far, by name.
    """

    def __init__(self, model: Model, limits: Limits, budget: int | None = None):
        model.eval()
        self.model, self.limits = model, limits
        self.adapters = named_adapters(model)
        self.adapters.budget = budget
        self.standing: list[str | None] = [None]
        self.batch = Batch(model, limits.slots, limits.context_tokens, self.standing)
        self.counts = dict.fromkeys(
            ("prompt_tokens", "tokens", "answers", "cancelled", "failed", "rounds"), 0
        )
        self.first_token_seconds = 0.0  # the sum over all answers
        self._apart: set[str] = set()  # adapters that share no batch
        self._retired: set[str] = set()
        self._running: dict[Row, Answer] = {}
        self._queue = FairQueue()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="lorax-engine", daemon=True)
        self._thread.start()

    # From any thread ---------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def waiting(self) -> int:
        """Answers without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Answers with one."""
        return len(self._running)

    def submit(self, answers: list[Answer]) -> None:
        """Have these answered: all of them, or none.

        Raises:
            Full: too many wait. Closed: the engine ends.
        """
        with self._changed:
            if not self.is_alive:
                raise Closed
            if len(self._queue) + len(answers) > self.limits.queue + self.limits.slots - len(
                self._running
            ):
                raise Full
            for answer in answers:
                self._queue.add(answer)
            self._changed.notify()

    def call(self, function: Callable[[], Found]) -> Future[Found]:
        """Have a function called between two rounds, where the model may be changed."""
        future: Future[Found] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if not self.is_alive:
                raise Closed
            self._calls.append(run)
            self._changed.notify()
        return future

    def retire(self, adapter: str) -> None:
        """Remove an adapter as soon as no answer needs it; inside a `call` only."""
        self._retired.add(adapter)

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing more; give what is under way so long, then end it."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        for answer in [*self._queue.all(), *self._running.values()]:
            answer.is_cancelled = True
        self._thread.join()

    # In the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        while self._has_work():
            while self._calls:
                self._calls.popleft()()
            self._drop()
            self._admit()
            if self._running:
                self._round()
            self._remove_retired()

    def _has_work(self) -> bool:
        """Waits until there is something to do; whether there is, and not the end."""
        with self._changed:
            while not (self._calls or self._queue or self._running or self._is_closing):
                self._changed.wait()
            return bool(self._calls or self._queue or self._running)

    def _drop(self) -> None:
        """Those that nobody waits for, and those whose time is over."""
        now = time.monotonic()
        with self._changed:
            waiting = self._queue.all()
        for answer in [*waiting, *self._running.values()]:
            if answer.is_cancelled:
                self._leave(answer, "cancelled")
            elif now > answer.deadline:
                self._fail(answer, 504, f"no end within {self.limits.request_seconds:g} seconds")

    def _leave(self, answer: Answer, why: str) -> None:
        self.counts[why] += 1
        if self._running.pop(answer.row, None) is None:
            with self._changed:
                self._queue.remove(answer)
        self.batch.drop(answer.row)

    def _fail(self, answer: Answer, status: int, message: str) -> None:
        self._leave(answer, "failed")
        try:
            answer.fail(status, message)
        except Exception as error:  # one that cannot be told ends no other
            log.warning("an answer was not delivered: %s (%s)", message, error)

    def _fail_all(self, error: Exception) -> None:
        for answer in list(self._running.values()):
            self._fail(answer, *_status(error))

    def _remove_retired(self) -> None:
        if not self._retired:
            return
        with self._changed:
            needed = {a.row.adapter for a in [*self._queue.all(), *self._running.values()]}
        gone = self._retired - needed
        self._retired -= gone
        if gone & set(self.standing):
            rest = [name for name in self.standing if name not in gone]
            try:
                self._stand(rest or [None])
            except Exception as error:  # files that went while one of the rest was on disk
                self._fail_all(error)
                self._stand([None])
        for name in gone:
            self._apart.discard(name)
            self.adapters.remove(name)

    def _admit(self) -> None:
        """Give free slots to those whose turn it is."""
        while self.batch.free:
            with self._changed:
                if not self._queue:
                    return
                answer = self._queue.first(row.adapter for row in self.batch.rows)
            try:
                if not self._may_join(answer.row.adapter):
                    return  # it is the next one all the same, or it would wait for ever
            except Exception as error:
                log.warning("%s: %s", answer.row.adapter, error)
                self._fail(answer, *_status(error))
                continue
            with self._changed:
                self._queue.remove(answer)
            self.batch.add(answer.row)
            self._running[answer.row] = answer
            self.counts["prompt_tokens"] += answer.prompt_tokens

    def _may_join(self, name: str | None) -> bool:
        """Whether the batch can have this adapter now; it is then ready for it."""
        if name in self.standing:
            return True
        running = {row.adapter for row in self.batch.rows}
        if name not in self._apart and not running & self._apart:
            others = [one for one in self._beside(running | {name}) if one is not None]
            if self.adapters.budget is None or len(others) <= self.adapters.budget:
                try:
                    self._stand([None, *others])
                    return True
                except AdapterError:  # it shares no batch, or cannot be had at all
                    if name is not None:
                        self._apart.add(name)
        if running:
            return False
        self._stand([name])
        return True

    def _beside(self, needed: set[str | None]) -> list[str | None]:
        """The needed ones, and as many of those that stand now as there is room for."""
        most = min(self.adapters.budget or _MOST_STANDING, _MOST_STANDING)
        kept = [n for n in self.standing if n not in needed | self._apart and n is not None]
        room = max(0, most - len(needed - {None}))
        return [*sorted(needed - {None}, key=str), *kept[:room]]

    def _stand(self, names: list[str | None]) -> None:
        self.batch.assign(names)
        self.standing = names

    def _round(self) -> None:
        try:
            found = self.batch.round()
        except Exception as error:
            log.exception("a round of tokens failed")
            self._fail_all(error)
            return
        self.counts["rounds"] += 1
        for row, token in found:
            if row in self._running:
                self._give(self._running[row], token)

    def _give(self, answer: Answer, token: int | None) -> None:
        """One answer's token, or its end."""
        if not answer.row.is_finite:
            self._fail(answer, 500, "the model's numbers for this prompt are not finite")
            return
        if token is not None:
            self.counts["tokens"] += 1
            if answer.made == 1:
                self.first_token_seconds += time.monotonic() - answer.asked
        try:
            goes_on = answer.end() if token is None else answer.take(token)
        except Exception as error:  # its text; or its client and their loop are gone
            self._fail(answer, *_status(error))
            return
        if not goes_on:
            self._leave(answer, "answers")


def _status(error: Exception) -> tuple[int, str]:
    """The HTTP status and words of an error while answering."""
    return 500, str(error) if isinstance(error, LoraxError) else "internal error"
