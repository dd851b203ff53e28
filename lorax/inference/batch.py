"""Answers to many prompts, several at a time, token by token.

    free      slots of the cache; a row that ends gives its slot to the next prompt
    rows      those being answered: a new one's prompt goes through the model alone, then all of
              them take their next token in one pass

Each prompt is answered as if it were alone: nothing is padded (rows.py), and its draws come from a
generator of its own. So rows may come and go between any two tokens: `stream_rows` adds the next of
its prompts, the server (server/engine.py) whatever was asked for meanwhile.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorax.errors import NumericalStop
from lorax.inference.gpu import decoder_of
from lorax.inference.named import named_adapters
from lorax.inference.rows import RowsCache
from lorax.inference.twins import with_twins
from lorax.models import Model
from lorax.models.watched import is_watched
from lorax.text import one_line

log = logging.getLogger("lorax")


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: see `lorax.inference.generate.generate`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class Row:
    """A prompt, and how it stands.

    seen: its tokens, and those made so far. left: how many more may come, 1 at least. ends: the
    tokens that end it. adapter: its own, where rows have their own. index: whatever the caller
    knows it by. slot: its place in the cache. has_begun: whether the cache holds it. logits: (V,),
    from which its last token was chosen. is_finite: whether they were numbers.
    """

    seen: list[int]
    left: int
    ends: Collection[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    index: int = 0
    slot: int = -1
    generator: torch.Generator | None = None
    has_begun: bool = False
    logits: Tensor | None = None
    is_finite: bool = True


def stream_rows(
    model: Model,
    ends: Collection[int],
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    sampling: Sampling | None = None,
    batch_size: int = 8,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[tuple[int, int | None]]:
    """The new tokens as they are made: a prompt's index with a token; with None once it has ended.

    Args:
        model: on any device; adapters, merged or not, take part as they are at the first token.
        ends: the tokens that end an answer; they are not given.
        prompts: the tokens of each, at least one; the caller has looked at them.
        counts: how many tokens each gets at most.
        sampling: the same for all; None takes the likeliest token each time.
        batch_size: how many are answered together.
        adapters: each prompt's own by its name, None for the base alone; not given, what the model
            has in use.
    """
    was_training = model.training
    model.eval()
    try:
        how = sampling or Sampling()
        names = adapters if adapters is not None else [None] * len(prompts)
        rows = [
            Row(list(prompt), count, ends, how, name, index)
            for index, (prompt, count, name) in enumerate(zip(prompts, counts, names, strict=True))
        ]
        yield from ((row.index, None) for row in rows if row.left < 1)
        rows = [row for row in rows if row.left > 0]
        budget = None if adapters is None else named_adapters(model).budget
        for wave in _waves(rows, budget):
            slots = min(max(1, batch_size), len(wave))
            places = max(len(row.seen) + row.left for row in wave)
            own = None if adapters is None else list(dict.fromkeys(row.adapter for row in wave))
            yield from _answer(Batch(model, slots, places, own), wave)
    finally:
        model.train(was_training)


def _answer(batch: Batch, rows: Iterable[Row]) -> Iterator[tuple[int, int | None]]:
    waiting = deque(rows)
    while waiting or batch.rows:
        while waiting and batch.free:
            batch.add(waiting.popleft())
        for row, token in batch.round():
            if not row.is_finite:
                raise NumericalStop(
                    f"the logits behind {len(row.seen) - 1} tokens are not finite; expected "
                    "numbers; try dtype float32, and look at the weights with lorax inspect"
                )
            yield row.index, token


class Assigned:
    """A model whose rows have adapters of their own, for as long as these rows are answered.

    twin: the model for generation. Where somebody watches a module, that module computes itself,
    and the adapters are put into the model for each pass.
    """

    def __init__(self, model: Model, names: Sequence[str | None]):
        self.adapters = named_adapters(model)
        self.is_watched = any(is_watched(module) for module in model.modules())
        with self.adapters.standing(names) as groups:
            self.groups = groups
            self.twin = with_twins(model)

    @contextmanager
    def to(self, rows: list[Row]) -> Iterator[None]:
        """Inside, row i of a pass is rows[i]."""
        names = [row.adapter for row in rows]
        if self.is_watched:
            with self.adapters.rows(names, len(names)):
                yield
        else:
            self.groups.set(names)
            yield


def _waves(rows: list[Row], budget: int | None) -> Iterator[list[Row]]:
    """The rows, in order, in groups of no more adapters than may be in memory at once."""
    wave: list[Row] = []
    seen: set[str | None] = set()
    for row in rows:
        more = seen | ({row.adapter} - {None})
        if budget is not None and len(more) > budget:
            yield wave
            wave, more = [], {row.adapter}
        wave.append(row)
        seen = more
    if wave:
        yield wave


class Batch:
    """What stands at the top of this file: up to `slots` rows of up to `places` tokens each.

    names: see `assign`; not given, all rows have what the model has in use.
    """

    def __init__(
        self, model: Model, slots: int, places: int, names: Sequence[str | None] | None = None
    ):
        self.source = model
        self.device = next(model.parameters()).device
        self.assigned: Assigned | None = None
        if names is None:
            with torch.no_grad():
                self.model = with_twins(model)
        else:
            self.assign(names)
        self.cache = RowsCache(model, slots, places)
        self.decoder = decoder_of(self.model, self.cache) if names is None else None
        self.free = deque(range(slots))
        self.rows: list[Row] = []

    def assign(self, names: Sequence[str | None]) -> None:
        """Let each row have its own adapter from now on, one of these, None for the base alone.

        Raises:
            UsageError: more than the budget has. AdapterError: one cannot share a batch. The rows
                that are being answered then go on as they were.
        """
        with torch.no_grad():
            self.assigned = Assigned(self.source, names)
        self.model = self.assigned.twin

    def add(self, row: Row) -> None:
        """Answer this one as well, from the next round on; there must be a free slot."""
        row.slot = self.free.popleft()
        if row.sampling.seed is not None:
            row.generator = torch.Generator(self.device).manual_seed(row.sampling.seed)
        self.rows.append(row)

    def drop(self, row: Row) -> None:
        """Answer this one no further."""
        if row in self.rows:
            self.rows.remove(row)
            self.free.append(row.slot)

    def round(self) -> list[tuple[Row, int | None]]:
        """A token for each row; behind it None where it was the last one.

        The token that ends a row is not given; it is the last that the row has seen.
        """
        found: list[tuple[Row, int | None]] = []
        for row, token in zip(list(self.rows), self._next_tokens(), strict=True):
            row.seen.append(token)
            row.left -= 1
            if token not in row.ends:
                found.append((row, token))
            if token in row.ends or not row.left:
                self.drop(row)
                found.append((row, None))
        return found

    def _adapters_of(self, rows: list[Row]) -> AbstractContextManager[None]:
        """Inside, the model's rows are these."""
        return nullcontext() if self.assigned is None else self.assigned.to(rows)

    @torch.inference_mode()
    def _next_tokens(self) -> list[int]:
        hidden: dict[Row, Tensor] = {}
        together = []
        for row in self.rows:
            if row.has_begun and self.cache.lengths[row.slot] != self.model.cache_border:
                together.append(row)
            else:  # a new prompt; or, as in transformers, all of it once more behind the border
                ids = torch.tensor([row.seen], device=self.device)  # (1, T)
                whole = self.cache.whole(row.slot)
                with self._adapters_of([row]):
                    hidden[row] = self.model.hidden_states(ids, whole)[0, -1]
                row.has_begun = True
        if together:
            with self._adapters_of(together):
                last = self._step([r.slot for r in together], [r.seen[-1] for r in together])
            hidden |= {row: last[i] for i, row in enumerate(together)}
        with self._adapters_of(self.rows):
            logits = self.model.logits(torch.stack([hidden[row] for row in self.rows]))  # (B, V)
        finite = logits.amax(-1).isfinite().tolist()
        for row, row_logits, is_finite in zip(self.rows, logits, finite, strict=True):
            row.logits, row.is_finite = row_logits, is_finite
        likeliest = logits.float().argmax(-1).tolist()
        return [_choose(row, int(token)) for row, token in zip(self.rows, likeliest, strict=True)]

    def _step(self, slots: list[int], tokens: list[int]) -> Tensor:
        """The hidden states (B, C) of one token for each slot."""
        if self.decoder is not None:
            try:
                return self.decoder.step(slots, tokens)
            except RuntimeError as error:  # a capture that this driver refuses
                log.warning("tokens are computed without a graph: %s", one_line(error))
                self.decoder = None
        ids = torch.tensor(tokens, device=self.device)[:, None]  # (B, 1)
        return self.model.hidden_states(ids, self.cache.step(slots))[:, -1]


def _choose(row: Row, likeliest: int) -> int:
    how = row.sampling
    if how.temperature == 0 or not row.is_finite:
        return likeliest
    assert row.logits is not None
    return draw(row.logits.float(), how.temperature, how.top_p, row.generator)


def draw(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """One token from logits (V,), drawn at a temperature above 0."""
    least = torch.finfo(logits.dtype).tiny  # a smaller temperature would be 0 there
    scaled = (logits - logits.max()) / max(temperature, least)
    probabilities, tokens = scaled.softmax(0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities  # the likelier ones' share
    probabilities[1:][before[1:] >= top_p] = 0.0  # one stays, however small top_p is
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(tokens[drawn])
