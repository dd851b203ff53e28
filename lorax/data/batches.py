"""Rows into batches: an order that the seed alone decides, and little padding.

A step's batch is a set of rows; micro-batches only cut it into what fits the memory. So its rows
are sorted by length before they are cut, and each micro-batch is padded to its own longest row. The
right side is padded: causal attention keeps the padding from what stands before it, and the labels
there are masked.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorax.data.examples import Example

IGNORED = -100  # the label that no loss counts, as in torch's cross_entropy


@dataclass(frozen=True)
class MicroBatch:
    """input_ids and labels, (B, T) int64 each; a label is the token at its own place, or -100."""

    input_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return MicroBatch(self.input_ids.to(device), self.labels.to(device))


def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the rows in an epoch (from 0): by seed and epoch, and by nothing else."""
    if not shuffle:
        return list(range(rows))
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)  # torch's generator drops seeds' high bits
    return order


def step_batches(
    rows: Sequence[Example], batch_size: int, seed: int, shuffle: bool
) -> Iterator[tuple[float, list[Example]]]:
    """Batches without end, epoch after epoch: (epochs done after this batch, its rows)."""
    epoch = 0
    while True:
        order = epoch_order(len(rows), seed, epoch, shuffle)
        for start in range(0, len(order), batch_size):
            stop = min(start + batch_size, len(order))
            yield epoch + stop / len(order), [rows[i] for i in order[start:stop]]
        epoch += 1


def micro_batches(rows: Sequence[Example], size: int, pad_id: int) -> list[MicroBatch]:
    """Cut rows into padded micro-batches of at most `size`, the longest rows first."""
    by_length = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    return [pad(by_length[i : i + size], pad_id) for i in range(0, len(by_length), size)]


def pad(rows: Sequence[Example], pad_id: int) -> MicroBatch:
    """Pad rows on the right to the longest; the padding is masked by its position."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.ids, dtype=torch.int64)
        trained = torch.tensor(row.trained, dtype=torch.bool)
        input_ids[index, : len(row.ids)] = ids
        labels[index, : len(row.ids)] = torch.where(trained, ids, IGNORED)
    return MicroBatch(input_ids, labels)
