"""What a client may ask for, and how long for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of the server; each is a bound on memory or time that a client could otherwise take.

    slots: answers made together. context_tokens: prompt and answer of one; slots times this is the
    size of the cache. answer_tokens: of one answer, also where a request gives no bound.
    queue: requests that wait for a slot. body_bytes: of a request. request_seconds: from asking to
    the last token. patience_seconds: for a client to send its request, or to read what waits for
    it. drain_seconds: for answers under way, once the server was told to end.
    """

    slots: int = 8
    context_tokens: int = 2048
    answer_tokens: int = 1024
    queue: int = 128
    body_bytes: int = 2**20
    request_seconds: float = 600.0
    patience_seconds: float = 30.0
    drain_seconds: float = 30.0
