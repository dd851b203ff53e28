"""From a checked request to answers in the engine, and their pieces back in the server's loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

from starlette.concurrency import run_in_threadpool

from lorax.data.prompts import encode_conversation
from lorax.data.vocabulary import check_vocabulary
from lorax.errors import LoraxError
from lorax.inference.batch import Row, Sampling
from lorax.inference.server.adapters import Served
from lorax.inference.server.answer import Answer, Piece
from lorax.inference.server.engine import Closed, Engine, Full
from lorax.inference.server.protocol import Chat, Completion, Refused

Asked = Chat | Completion


class Answers:
    """The answers to one request: iterate over them for each one's index and next piece.

    Whoever stops before the end must `cancel`.
    """

    def __init__(self, engine: Engine, served: Served, asked: Asked, prompts: list[list[int]]):
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.prompt_tokens = sum(map(len, prompts))
        self.made = 0
        deadline = time.monotonic() + engine.limits.request_seconds
        self.all = [
            Answer(
                _row(engine, served, asked, ids),
                served.tokenizer,
                partial(self._take, index),
                deadline,
                asked.stops,
                asked.top,
            )
            for index, ids in enumerate(prompts)
        ]
        try:
            engine.submit(self.all)
        except Full:
            raise Refused("too many requests are waiting; try again later", 429) from None
        except Closed:
            raise Refused("the server is ending", 503) from None

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.all)
        while left:
            index, piece = await self._pieces.get()
            if piece.error is not None:
                status, message = piece.error
                raise Refused(message, status)
            if piece.finish is not None:
                self.made += piece.made
                left -= 1
            yield index, piece

    def _take(self, index: int, piece: Piece) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    def cancel(self) -> None:
        """Nobody waits for them any more."""
        for answer in self.all:
            answer.is_cancelled = True


async def encoded(asked: Asked, served: Served, vocabulary: int) -> list[list[int]]:
    """The prompts' tokens; in another thread, as a long text takes its time.

    Raises:
        Refused: a text, a conversation or a token that cannot be.
    """
    try:
        return await run_in_threadpool(_encode, asked, served, vocabulary)
    except LoraxError as error:
        raise Refused(str(error), param=_field(asked)) from None


def _encode(asked: Asked, served: Served, vocabulary: int) -> list[list[int]]:
    tokenizer = served.tokenizer
    if isinstance(asked, Chat):
        messages = [message.plain() for message in asked.messages]
        found = [encode_conversation(messages, {}, tokenizer)]
    else:
        found = [
            tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in asked.prompts
        ]
    for ids in found:
        check_vocabulary(ids, vocabulary, tokenizer)
    return found


def _field(asked: Asked) -> str:
    return "messages" if isinstance(asked, Chat) else "prompt"


def _row(engine: Engine, served: Served, asked: Asked, ids: Sequence[int]) -> Row:
    """The prompt with its bounds.

    Raises:
        Refused: prompt and answer are more than there is room for.
    """
    most = _answer_tokens(engine, asked, len(ids))
    ends = () if asked.ignore_eos else served.tokenizer.end_token_ids
    sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
    return Row(list(ids), most, ends, sampling, served.key)


def _answer_tokens(engine: Engine, asked: Asked, prompt_tokens: int) -> int:
    limits = engine.limits
    places = min(limits.context_tokens, engine.model.max_positions)
    room = places - prompt_tokens
    if not prompt_tokens or room < 1 or (asked.most or 0) > room:
        answer = f" and {asked.most} of the answer" if asked.most else ""
        raise Refused(
            f"This model's maximum context length is {places} tokens, and the request asks for "
            f"{prompt_tokens} of the prompt{answer}; expected 1 token or more, and room for an "
            "answer",
            param=_field(asked),
            code="context_length_exceeded",
        )
    if (asked.most or 0) > limits.answer_tokens:
        raise Refused(
            f"max_tokens {asked.most}; expected {limits.answer_tokens} at most",
            param="max_tokens",
            code="invalid_value",
        )
    return asked.most or min(room, limits.answer_tokens)
