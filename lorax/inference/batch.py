"""Answers to many prompts, several at a time, token by token.

    waiting   prompts without a slot
    rows      those being answered: a new one's prompt goes through the model alone, then all of
              them take their next token in one pass
    free      slots of the cache; a row that ends gives its slot to the next prompt

Each prompt is answered as if it were alone: nothing is padded (rows.py), and its draws come from a
generator of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorax.inference.gpu import decoder_of
from lorax.inference.rows import RowsCache
from lorax.inference.twins import with_twins
from lorax.models import Model


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: see `lorax.inference.generate.generate`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass
class Row:
    """A prompt: its place among the prompts, and how it stands.

    seen: its tokens, and those made so far. left: how many more may come. slot: its place in the
    cache. has_begun: whether the cache holds it.
    """

    index: int
    seen: list[int]
    left: int
    slot: int = -1
    generator: torch.Generator | None = None
    has_begun: bool = False


def stream_rows(
    model: Model,
    ends: Collection[int],
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    sampling: Sampling | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[int, int | None]]:
    """The new tokens as they are made: a prompt's index with a token; with None once it has ended.

    Args:
        model: on any device; adapters, merged or not, take part as they are at the first token.
        ends: the tokens that end an answer; they are not given.
        prompts: the tokens of each, at least one; the caller has looked at them.
        counts: how many tokens each gets at most.
        sampling: the same for all; None takes the likeliest token each time.
        batch_size: how many are answered together.
    """
    was_training = model.training
    model.eval()
    try:
        rows = [Row(i, list(p), n) for i, (p, n) in enumerate(zip(prompts, counts, strict=True))]
        yield from ((row.index, None) for row in rows if row.left < 1)
        rows = [row for row in rows if row.left > 0]
        if rows:
            batch = _Batch(model, rows, sampling or Sampling(), max(1, batch_size))
            while batch.rows:
                yield from batch.round(ends)
    finally:
        model.train(was_training)


class _Batch:
    """What stands at the top of this file."""

    def __init__(self, model: Model, rows: list[Row], sampling: Sampling, batch_size: int):
        self.sampling = sampling
        self.device = next(model.parameters()).device
        slots = min(batch_size, len(rows))
        with torch.no_grad():
            self.model = with_twins(model)
        self.cache = RowsCache(self.model, slots, max(len(r.seen) + r.left for r in rows))
        self.decoder = decoder_of(self.model, self.cache)
        self.free = deque(range(slots))
        self.waiting = deque(rows)
        self.rows: list[Row] = []
        self._admit()

    def round(self, ends: Collection[int]) -> Iterator[tuple[int, int | None]]:
        """A token for each row, and what follows from it."""
        going = []
        for row, token in zip(self.rows, self._next_tokens(), strict=True):
            row.seen.append(token)
            row.left -= 1
            if token not in ends:
                yield row.index, token
            if token in ends or not row.left:
                self.free.append(row.slot)
                yield row.index, None
            else:
                going.append(row)
        self.rows = going
        self._admit()

    def _admit(self) -> None:
        while self.waiting and self.free:
            row = self.waiting.popleft()
            row.slot = self.free.popleft()
            if self.sampling.seed is not None:
                row.generator = torch.Generator(self.device).manual_seed(self.sampling.seed)
            self.rows.append(row)

    @torch.inference_mode()
    def _next_tokens(self) -> list[int]:
        hidden = {}
        together = []
        for row in self.rows:
            if row.has_begun and self.cache.lengths[row.slot] != self.model.cache_border:
                together.append(row)
            else:  # a new prompt; or, as in transformers, all of it once more behind the border
                ids = torch.tensor([row.seen], device=self.device)  # (1, T)
                whole = self.cache.whole(row.slot)
                hidden[row.index] = self.model.hidden_states(ids, whole)[0, -1]
                row.has_begun = True
        if together:
            last = self._step([row.slot for row in together], [row.seen[-1] for row in together])
            hidden |= {row.index: last[i] for i, row in enumerate(together)}
        logits = self.model.logits(torch.stack([hidden[row.index] for row in self.rows]))  # (B, V)
        if self.sampling.temperature == 0:
            return [int(token) for token in logits.float().argmax(-1).tolist()]
        how = self.sampling.temperature, self.sampling.top_p
        return [
            draw(row_logits.float(), *how, row.generator)
            for row_logits, row in zip(logits, self.rows, strict=True)
        ]

    def _step(self, slots: list[int], tokens: list[int]) -> Tensor:
        """The hidden states (B, C) of one token for each slot."""
        if self.decoder is not None:
            return self.decoder.step(slots, tokens)
        ids = torch.tensor(tokens, device=self.device)[:, None]  # (B, 1)
        return self.model.hidden_states(ids, self.cache.step(slots))[:, -1]


def draw(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """One token from logits (V,), drawn at a temperature above 0."""
    probabilities, tokens = (logits / temperature).softmax(0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities  # the likelier ones' share
    probabilities[before >= top_p] = 0.0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(tokens[drawn])
