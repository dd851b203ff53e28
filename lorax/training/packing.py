"""How much of an epoch is padding, how many sequences packing fills, and whether a model packs.

    padded      places: rows x the longest row, of each micro-batch
    packed      places: the tokens, and nothing else

A step is train.batch_size rows either way, so packing changes no result. Other programs (trl,
torchtune) count packed sequences of max_length tokens as the rows of a batch; `Packing.sequences`
says how many the rows fill, for whoever takes a batch size over from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from lorax.backend import backend
from lorax.data.batches import fill, step_batches
from lorax.data.examples import Example
from lorax.errors import UnsupportedModel
from lorax.models import Model
from lorax.models.packed import Documents
from lorax.training.recipe import Recipe


@dataclass(frozen=True)
class Packing:
    """An epoch, padded and packed.

    sequences: of max_length tokens, that its rows fill as well as may be. passes and padded_passes:
    forward passes of either way. places: what the padded ones compute; tokens: what packed ones do.
    """

    rows: int
    tokens: int
    max_length: int
    sequences: int
    passes: int
    padded_passes: int
    places: int

    @property
    def saved(self) -> float:
        """The share of the padded places that packing leaves out."""
        return 1 - self.tokens / self.places

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.tokens:,} tokens, which fill {self.sequences} sequences of "
            f"{self.max_length} ({self.rows / self.sequences:.2f} rows each); an epoch is "
            f"{self.passes} forward passes without padding, in the place of {self.padded_passes} "
            f"of which {100 * self.saved:.1f} % is padding"
        )


def first_epoch(recipe: Recipe, rows: Sequence[Example]) -> list[list[Example]]:
    """The rows of each of the first epoch's steps."""
    train, data = recipe.train, recipe.data
    steps = step_batches(rows, train.batch_size, train.seed, data.shuffle, data.group_by_length)
    return [batch for _, batch in islice(steps, -(-len(rows) // train.batch_size))]


def packing_of(recipe: Recipe, rows: Sequence[Example]) -> Packing:
    """What packing does to a recipe's first epoch, whether the recipe packs or not."""
    size, max_length = recipe.train.micro_batch_size, recipe.data.max_length
    passes = padded_passes = places = 0
    for step in first_epoch(recipe, rows):
        passes += len(fill(step, size * max_length))
        lengths = sorted((len(row.ids) for row in step), reverse=True)
        longest = lengths[::size]  # of each micro-batch
        padded_passes += len(longest)
        places += sum(most * len(lengths[i * size :][:size]) for i, most in enumerate(longest))
    return Packing(
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        max_length=max_length,
        sequences=len(fill(rows, max_length)),
        passes=passes,
        padded_passes=padded_passes,
        places=places,
    )


def packs_documents(model: Model) -> bool:
    """Whether the model's attention keeps documents apart: asked of it with two of one token."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), backend("pytorch"):  # nothing is compiled for a question
            model.hidden_states(ids, Documents([1, 1]))
    except UnsupportedModel:
        return False
    return True
