"""Signals that ask a run to end, or to save: heard at once, obeyed behind the optimizer step.

SIGINT (Ctrl-C), SIGTERM    finish the step, save a checkpoint, end with 130 or 143
the same once more          end at once
SIGUSR1                     save a checkpoint, and go on
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))
_SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; no error of the user's, and so no LoraxError.

    exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Signals:
    """Notes the signals that arrive inside a `with`; what was set before is set again after it.

    at_once: whether a second one ends at once. Not under torchrun: it passes each Ctrl-C on to
        processes that the terminal has told already, and ends them itself half a minute later.

    stop: the signal that asked for the end, or None.
    save: whether a checkpoint was asked for since this was last set to False.
    """

    def __init__(self, at_once: bool = True) -> None:
        self._at_once = at_once
        self.stop: int | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others get none
            for number in _STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as shells' background jobs
                    self._before[number] = signal.signal(number, self._on_stop)
            if _SAVE is not None:
                self._before[_SAVE] = signal.signal(_SAVE, self._on_save)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None and self._at_once:
            raise Interrupted("at once: the step under way is lost", number)
        self.stop = number

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
