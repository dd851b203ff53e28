"""Answers and errors as OpenAI has them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from lorax.inference.server.adapters import Served
from lorax.inference.server.answer import Scored

_TYPES = {401: "invalid_request_error", 429: "rate_limit_error"}


def as_json(value: Any) -> bytes:
    """Plain ASCII: half of a surrogate pair, which a client may send, has no UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def error(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an answer with that status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models(served: Sequence[Served]) -> dict[str, Any]:
    """/v1/models, as vLLM has it: an adapter's root is its directory, its parent the base."""
    return {"object": "list", "data": [model(one, served[0]) for one in served]}


def model(one: Served, base: Served) -> dict[str, Any]:
    """One of them. Of the adapter's directory the name alone is told."""
    found = {"id": one.name, "object": "model", "created": one.created, "owned_by": "lorax"}
    if one.directory is None:
        return found | {"root": one.name, "parent": None}
    return found | {"root": one.directory.name, "parent": base.name}


def usage(prompt_tokens: int, made: int) -> dict[str, int]:
    """Counts of tokens, the end token included."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


class Reply:
    """The objects of one request's answer: whole, or in chunks. Those of chat."""

    whole_kind, chunk_kind, start = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, model: str):
        self.head = {
            "id": self.start + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        """All of it, with what `choice` gave."""
        return self.head | {"object": self.whole_kind, "choices": choices, "usage": counts}

    def chunk(
        self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """A part of it, with what `opening`, `delta` and `closing` gave."""
        body = self.head | {"object": self.chunk_kind, "choices": choices}
        return body if counts is None else body | {"usage": counts}

    def choice(
        self, index: int, text: str, scored: Sequence[Scored] | None, finish: str | None
    ) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(scored),
            "finish_reason": finish,
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What stands before the first text."""
        return [self._delta(index, {"role": "assistant", "content": ""}, None, None)]

    def delta(
        self, index: int, text: str, scored: Sequence[Scored] | None, finish: str | None
    ) -> list[dict[str, Any]]:
        """Choices with a piece of text, and with the end where there is one."""
        found = []
        if text or scored:
            found.append(self._delta(index, {"content": text}, scored, None))
        if finish is not None:
            found.append(self._delta(index, {}, None, finish))
        return found

    def logprobs(self, scored: Sequence[Scored] | None) -> dict[str, Any] | None:
        """In chat's form."""
        if scored is None:
            return None
        content = [
            {
                **_token(one.text, one.logprob),
                "top_logprobs": [_token(*pair) for pair in one.likeliest],
            }
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def _delta(
        self, index: int, delta: dict[str, str], scored: Sequence[Scored] | None, finish: str | None
    ) -> dict[str, Any]:
        logprobs = self.logprobs(scored)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class CompletionReply(Reply):
    """Those of /v1/completions."""

    whole_kind = chunk_kind = "text_completion"
    start = "cmpl-"

    def __init__(self, model: str):
        super().__init__(model)
        self.offsets: dict[int, int] = {}

    def choice(
        self, index: int, text: str, scored: Sequence[Scored] | None, finish: str | None
    ) -> dict[str, Any]:
        """A whole answer, or a piece of one."""
        logprobs = self._logprobs(index, scored)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def delta(
        self, index: int, text: str, scored: Sequence[Scored] | None, finish: str | None
    ) -> list[dict[str, Any]]:
        """A piece of text, or the end, or both."""
        return [self.choice(index, text, scored, finish)]

    def _logprobs(self, index: int, scored: Sequence[Scored] | None) -> dict[str, Any] | None:
        """In the form of completions: each token with its place in the answer's text."""
        if scored is None:
            return None
        offsets, at = [], self.offsets.get(index, 0)
        for one in scored:
            offsets.append(at)
            at += len(one.text)
        self.offsets[index] = at
        return {
            "tokens": [one.text for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [_by_text(one) for one in scored],
            "text_offset": offsets,
        }


def _by_text(one: Scored) -> dict[str, float]:
    """The likeliest; of two with the same text, as parts of characters have, the likelier one."""
    return dict(reversed(one.likeliest))


def _token(text: str, logprob: float) -> dict[str, Any]:
    """bytes: not known of a token that is a part of a character."""
    known = "\ufffd" not in text
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode("utf-8")) if known else None,
    }
