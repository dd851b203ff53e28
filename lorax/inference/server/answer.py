"""One answer under way: its tokens become text, up to a stop word, with log probabilities.

It lives in the engine's thread and sends pieces to whoever asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax.data.tokenizer import Tokenizer
from lorax.inference.batch import Row
from lorax.inference.text import TextOfTokens

_LEAST = -9999.0  # OpenAI's word for a probability of 0; JSON has no infinity


@dataclass(frozen=True)
class Scored:
    """A token's text and log probability; the likeliest ones' in its place, the likeliest first."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    finish: "stop" or "length", in the last piece. error: status and words, in the last piece of an
    answer that failed. made: how many tokens the whole answer has so far.
    """

    text: str = ""
    scored: tuple[Scored, ...] = ()
    made: int = 0
    finish: str | None = None
    error: tuple[int, str] | None = None


class Answer:
    """See above.

    row: its prompt and how it is sampled. stops: texts that end it; none of it is given from there
    on. top: how many of the likeliest tokens are told with each; None: no log probabilities.
    send: is called with each piece, from the engine's thread. deadline: by time.monotonic().
    """

    def __init__(
        self,
        row: Row,
        tokenizer: Tokenizer,
        send: Callable[[Piece], None],
        deadline: float,
        stops: Sequence[str] = (),
        top: int | None = None,
    ):
        self.row, self.tokenizer, self.send, self.deadline = row, tokenizer, send, deadline
        self.top = top
        self.prompt_tokens = len(row.seen)
        self.asked = time.monotonic()
        self.is_cancelled = False  # any thread may set it
        self._text = TextOfTokens(tokenizer)
        self._stops = StopWords(stops)
        self._scored: list[Scored] = []

    @property
    def made(self) -> int:
        """Tokens so far, the one that ended it included."""
        return len(self.row.seen) - self.prompt_tokens

    def take(self, token: int) -> bool:
        """One more token; whether the answer goes on behind it."""
        if self.top is not None:
            assert self.row.logits is not None
            self._scored.append(scored(self.row.logits, token, self.top, self.tokenizer))
        text = self._stops.add(self._text.add(token))
        if self._stops.found:
            self._say(text, finish="stop")
            return False
        if text:
            self._say(text)
        return True

    def end(self) -> bool:
        """The row has ended, by one of its end tokens or because no more may come: False."""
        text = self._stops.add(self._text.rest())
        if not self._stops.found:
            text += self._stops.held
        is_end = self._stops.found or self.row.seen[-1] in self.row.ends
        self._say(text, finish="stop" if is_end else "length")
        return False

    def fail(self, status: int, message: str) -> None:
        """It ends with an error."""
        self.send(Piece(made=self.made, error=(status, message)))

    def _say(self, text: str, finish: str | None = None) -> None:
        told, self._scored = tuple(self._scored), []
        self.send(Piece(text, told, self.made, finish))


class StopWords:
    """Text that passes until a stop word; what may become one is held back.

    found: whether there was one. held: what waits for its next character.
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be given, now that this came."""
        self.held += text
        places = [at for word in self.words if (at := self.held.find(word)) >= 0]
        if places:
            self.found = True
            given, self.held = self.held[: min(places)], ""
            return given
        keep = max((_begun(self.held, word) for word in self.words), default=0)
        cut = len(self.held) - keep
        given, self.held = self.held[:cut], self.held[cut:]
        return given


def _begun(text: str, word: str) -> int:
    """How many characters at the text's end are the word's first ones."""
    most = min(len(text), len(word) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(word[:n])), 0)


def scored(logits: Tensor, token: int, top: int, tokenizer: Tokenizer) -> Scored:
    """A token's place among logits (V,), before any temperature."""
    logprobs = logits.float().log_softmax(0)
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    likeliest = tuple((tokenizer.decode([one]), max(value, _LEAST)) for one, value in pairs)
    return Scored(tokenizer.decode([token]), max(float(logprobs[token]), _LEAST), likeliest)
