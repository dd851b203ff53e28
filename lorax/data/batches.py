"""Rows into batches: an order that the seed alone decides, and little padding.

A step's batch is a set of rows; micro-batches only cut it into what fits the memory. So its rows
are sorted by length before they are cut, and each micro-batch is padded to its own longest row. The
right side is padded: causal attention keeps the padding from what stands before it, and the labels
there are masked. Two ways to pad less:

    grouped     rows of like length share a step; which rows do is then another than without
    packed      a step's rows behind each other, without any padding; the step stays as it is
"""

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorax.data.examples import Example
from lorax.models.packed import Documents

IGNORED = -100  # the label that no loss counts, as in torch's cross_entropy
GROUPED_BATCHES = 50  # batches' rows that are sorted together, as transformers' Trainer does


class MicroBatch(NamedTuple):
    """input_ids and labels, (B, T) int64 each; a label is the token at its own place, or -100.

    documents: that are packed in one sequence, B = 1; None where each row is one.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Documents | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return MicroBatch(self.input_ids.to(device), self.labels.to(device), self.documents)


def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the rows in an epoch (from 0): by seed and epoch, and by nothing else."""
    if not shuffle:
        return list(range(rows))
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)  # torch's generator drops seeds' high bits
    return order


def grouped(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[int]:
    """An epoch's order, moved about so that rows of like length share a batch.

    50 batches' rows at a time are sorted by length and cut; then the batches are shuffled, so that
    steps go neither up nor down in length. The batch with the longest row comes first, for memory
    to run out there if it does at all, and one that is not full stays last.
    """
    reach = GROUPED_BATCHES * batch_size
    chunks = [order[i : i + reach] for i in range(0, len(order), reach)]
    by_length = [i for c in chunks for i in sorted(c, key=lambda i: lengths[i], reverse=True)]
    batches = [by_length[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rest = batches.pop() if len(order) % batch_size else []
    longest = max(range(len(batches)), key=lambda b: lengths[batches[b][0]], default=None)
    first = [] if longest is None else batches.pop(longest)
    random.Random(f"{seed} {epoch} batches").shuffle(batches)
    return [i for batch in (first, *batches, rest) for i in batch]


def step_batches(
    rows: Sequence[Example],
    batch_size: int,
    seed: int,
    shuffle: bool,
    group_by_length: bool = False,
) -> Iterator[tuple[float, list[Example]]]:
    """Batches without end, epoch after epoch: (epochs done after this batch, its rows)."""
    lengths = [len(row.ids) for row in rows]
    epoch = 0
    while True:
        order = epoch_order(len(rows), seed, epoch, shuffle)
        if group_by_length:
            order = grouped(order, lengths, batch_size, seed, epoch)
        for start in range(0, len(order), batch_size):
            stop = min(start + batch_size, len(order))
            yield epoch + stop / len(order), [rows[i] for i in order[start:stop]]
        epoch += 1


def micro_batches(
    rows: Sequence[Example], size: int, pad_id: int, room: int | None = None
) -> list[MicroBatch]:
    """Cut rows into padded micro-batches of at most `size`, the longest rows first.

    room: tokens of a packed micro-batch; where it is given, rows are packed, and size is not used.
    """
    if room is not None:
        return [pack(part) for part in fill(rows, room)]
    by_length = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    return [pad(by_length[i : i + size], pad_id) for i in range(0, len(by_length), size)]


def fill(rows: Sequence[Example], room: int) -> list[list[Example]]:
    """Rows into as few packs of `room` tokens as will do: best fit, the longest rows first.

    A row that is longer than `room` has a pack of its own.
    """
    packs: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (tokens that are free, which pack), the fullest first
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        place = bisect_left(free, (len(row.ids), 0))
        if place < len(free):
            left, index = free.pop(place)
        else:
            left, index = room, len(packs)
            packs.append([])
        packs[index].append(row)
        insort(free, (left - len(row.ids), index))
    return packs


def pack(rows: Sequence[Example]) -> MicroBatch:
    """Rows behind each other, (1, T). A row's first token follows nothing and is no label."""
    ids, labels = [], []
    for row in rows:
        ids += row.ids
        trained = zip(row.ids[1:], row.trained[1:], strict=True)
        labels += [IGNORED, *(token if said else IGNORED for token, said in trained)]
    documents = Documents(tuple(len(row.ids) for row in rows))
    return MicroBatch(torch.tensor([ids]), torch.tensor([labels]), documents)


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
