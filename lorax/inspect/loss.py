"""Does the loss depend on what it must not depend on? Measured on a recipe's own rows.

The loss of an optimizer step is the mean over its trained tokens, whatever the micro-batches, the
padding and the order of the rows. So one step is computed several ways, dropout off:

    reference    all rows in one micro-batch
    rows 1, 2, . micro-batches of so many rows
    padded       every row padded to data.max_length
    reversed     the rows in another order
    packed       the rows behind each other without padding: as data.packing does it, in one
                 sequence, and in that sequence the other way round

What differs is the order of additions. Over float32 that is some 1e-7 of the loss; where it is more
than the bound of the dtype, something weighs rows by their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lorax.adapters.tables import embedding_weight
from lorax.data.batches import IGNORED, MicroBatch, micro_batches, pack, pad
from lorax.data.examples import Example
from lorax.data.vocabulary import padding_id
from lorax.models import Model
from lorax.training.loss import summed_loss
from lorax.training.packing import first_epoch, packs_documents
from lorax.training.plan import prepare
from lorax.training.recipe import Recipe

# Relative: of the loss, and of each gradient's norm. float32's is what R-promises call rounding.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Way:
    """One way to compute the step: its loss, and how far loss and worst gradient are off."""

    name: str
    loss: float
    loss_gap: float
    gradient_gap: float
    worst: str


@dataclass(frozen=True)
class LossReport:
    """The same step, several ways. bound: relative, of the dtype that the model computes in."""

    rows: int
    tokens: int
    dtype: str
    bound: float
    ways: list[Way]

    @property
    def holds(self) -> bool:
        """Whether every way gives the same step, within rounding."""
        return all(max(way.loss_gap, way.gradient_gap) <= self.bound for way in self.ways)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "holds": self.holds}


def inspect_loss(recipe: Recipe) -> LossReport:
    """Compute the first step of a recipe in each of these ways.

    Raises:
        All that `lorax.train` raises before it writes anything.
    """
    torch.manual_seed(recipe.train.seed)
    model, tokenizer, plan = prepare(recipe)
    model.eval()  # dropout draws other numbers for other batches
    _wake(model)
    settings = recipe.train
    (rows, *_) = first_epoch(recipe, plan.train_rows)
    pad_id = padding_id(tokenizer.pad_token_id, embedding_weight(model).shape[0])
    batches = _ways(rows, recipe.data.max_length, pad_id)
    if packs_documents(model):
        batches |= _packed_ways(rows, settings.micro_batch_size * recipe.data.max_length)
    tokens = sum(row.tokens for row in rows)
    reference: tuple[float, dict[str, Tensor]] | None = None
    ways = []
    for name, make in batches.items():
        loss, gradients = _step(model, make(), tokens)
        reference = reference or (loss, gradients)
        ways.append(_held(name, loss, gradients, *reference))
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    bound = BOUNDS.get(dtype, BOUNDS[torch.float32])
    return LossReport(len(rows), tokens, str(dtype).removeprefix("torch."), bound, ways)


def _wake(model: Model) -> None:
    """Away from a start at which B is zero and half of the gradients with it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.01 * noise).to(parameter))


def _ways(rows: list[Example], max_length: int, pad_id: int) -> dict[str, Callable[[], Any]]:
    sizes = sorted({1, 2, max(1, len(rows) // 2)} - {len(rows)})

    def cut(size: int) -> list[MicroBatch]:
        return micro_batches(rows, size, pad_id)

    made: dict[str, Callable[[], list[MicroBatch]]] = {"all rows at once": partial(cut, len(rows))}
    made |= {f"micro-batches of {size}": partial(cut, size) for size in sizes}
    made["padded to max_length"] = lambda: [_wider(b, max_length, pad_id) for b in cut(len(rows))]
    made["rows reversed"] = lambda: [pad(rows[::-1], pad_id)]
    return made


def _packed_ways(rows: list[Example], room: int) -> dict[str, Callable[[], list[MicroBatch]]]:
    return {
        f"packed, {room} tokens a pass": lambda: micro_batches(rows, 1, 0, room),
        "packed in one": lambda: [pack(rows)],
        "packed in one, reversed": lambda: [pack(rows[::-1])],
    }


def _wider(batch: MicroBatch, width: int, pad_id: int) -> MicroBatch:
    more = max(0, width - batch.input_ids.shape[1])
    padded = torch.nn.functional.pad
    return batch._replace(
        input_ids=padded(batch.input_ids, (0, more), value=pad_id),
        labels=padded(batch.labels, (0, more), value=IGNORED),
    )


def _step(model: Model, batches: list[MicroBatch], tokens: int) -> tuple[float, dict[str, Tensor]]:
    device = next(model.parameters()).device
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        there = batch.to(device)
        part = summed_loss(model, *there) / tokens
        part.backward()
        loss += part.item()
    named = model.named_parameters()
    return loss, {n: p.grad.detach().float().clone() for n, p in named if p.grad is not None}


def _held(
    name: str, loss: float, gradients: dict[str, Tensor], base: float, expected: dict[str, Tensor]
) -> Way:
    total = sum(g.square().sum() for g in expected.values()) ** 0.5
    gaps = {n: ((gradients[n] - g).norm() / total).item() for n, g in expected.items()}
    worst = max(gaps, key=lambda n: gaps[n])
    whole = sum(gap**2 for gap in gaps.values()) ** 0.5
    return Way(name, loss, abs(loss - base) / abs(base), whole, worst)


def parts(report: LossReport) -> Iterator[str | Table]:
    """The report for a terminal."""
    yield f"one step of {report.rows} rows, {report.tokens} trained tokens, in {report.dtype}"
    table = Table("computed with", "loss", "off by", "gradients off by", "most in", box=None)
    for way in report.ways:
        gaps = f"{way.loss_gap:.1e}", f"{way.gradient_gap:.1e}"
        table.add_row(way.name, f"{way.loss:.7f}", *gaps, way.worst)
    yield table
    if report.holds:
        yield f"holds: every way gives the same step within {report.bound:.0e} (rounding)"
    else:
        yield f"does not hold: a way is off by more than {report.bound:.0e} (rounding)"
