"""Several processes, one run: what each of them does, and what they tell each other.

    torchrun --nproc-per-node 4 -m lorax train recipe.toml

All processes read the same recipe, load the same model and rows, and walk through the same order of
steps. They differ in the micro-batches that they compute:

    rows of the step  ->  micro-batches, by length  ->  process r takes r, r + N, r + 2 N, ...

A micro-batch's loss is a sum over its tokens divided by the tokens of the whole step, so the sum of
all processes' gradients is that of one process: the number of processes changes rounding alone. It
is summed once a step, behind the last micro-batch, by torch's DistributedDataParallel, or by it
over the adapters and FSDP2 over the frozen base (sharding.py). Clipping and the optimizer's step
then see the same gradients everywhere. Process 0 writes; the others only compute.

Dropout draws from a generator that starts anew at each step, from the recipe's seed, the step and
the process: so a run goes on exactly from a checkpoint that does not know of the others.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorax.data.batches import IGNORED, MicroBatch
from lorax.errors import RecipeError
from lorax.models import Model
from lorax.training.loss import summed_loss


class Processes:
    """One process alone: everything is its own, and nothing is to be told.

    rank: this process's number. size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def micro_batch_size(self, rows: int, most: int) -> int:
        """Rows of a micro-batch: at most `most`, and few enough that every process gets one."""
        return min(most, -(-rows // self.size))

    def share(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """This process's micro-batches: as many as every other's, the last maybe an empty one."""
        mine = batches[self.rank :: self.size]
        if len(mine) < -(-len(batches) // self.size):
            mine.append(_empty(batches[-1]))
        return mine

    def gradients(self, model: Model, parallel: str) -> Gradients:
        """What computes a step's gradients: the sum over all processes.

        parallel: train.parallel of the recipe.
        """
        return Gradients(model)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, (...) as `value`."""
        return value

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all processes."""
        return values

    def from_writer(self, value: Any) -> Any:
        """Process 0's value, in every process; each waits until it is there."""
        return value

    def seed(self, seed: int, step: int) -> None:
        """Begin this step's random numbers, where processes would draw the same ones."""


class Gradients:
    """Adds up the gradients of a step's micro-batches."""

    def __init__(self, model: Model):
        self.model = model

    def add(self, batch: MicroBatch, tokens: int, is_last: bool) -> Tensor:
        """Those of the batch's summed loss / tokens; that loss of this process, () float32.

        is_last: behind this one they are those of all processes.
        """
        graphs = getattr(self.model, "step_graphs", None)  # put there by `accelerated`
        loss = None if graphs is None else graphs.add(batch, tokens)
        if loss is None:
            loss = summed_loss(self.model, *batch) / tokens
            loss.backward()
        return loss.detach()


class _Group(Processes):
    """One of several, as torchrun started them."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gradients(self, model: Model, parallel: str) -> Gradients:
        if parallel == "fsdp":
            from lorax.training.sharding import shard_base

            shard_base(model, self.size)
        return _SummedGradients(model, self.size)

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def largest(self, *values: int) -> tuple[int, ...]:
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def from_writer(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def seed(self, seed: int, step: int) -> None:
        digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))


class _LossModule(nn.Module):
    """The loss as a forward pass, for DistributedDataParallel to wrap."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, *batch: Any) -> Tensor:
        return summed_loss(self.model, *batch)


class _SummedGradients(Gradients):
    """Sums over processes, once a step, behind the last micro-batch."""

    def __init__(self, model: Model, size: int):
        super().__init__(model)
        self._size = size
        for parameter in model.parameters():
            if parameter.requires_grad:  # the same start, whatever this process computed
                dist.broadcast(parameter.data, src=0)
        with warnings.catch_warnings():
            # torch 2.13 has another word for it, which torch 2.10 does not know yet.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            self._parallel = nn.parallel.DistributedDataParallel(
                _LossModule(model), broadcast_buffers=False, init_sync=False
            )

    def add(self, batch: MicroBatch, tokens: int, is_last: bool) -> Tensor:
        with nullcontext() if is_last else self._parallel.no_sync():
            loss: Tensor = self._parallel(*batch) / tokens
            (loss * self._size).backward()  # DistributedDataParallel takes the mean
        return loss.detach()


def _empty(like: MicroBatch) -> MicroBatch:
    """Two tokens that no loss counts, for a process that is waited for and has nothing to do."""
    labels = torch.full((1, 2), IGNORED, dtype=torch.int64)
    return MicroBatch(like.input_ids[:1, :1].expand(1, 2).contiguous(), labels)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, connected until the end; this one alone without it.

    Args:
        device: model.device of the recipe; "cuda" is then this process's own GPU.

    Raises:
        RecipeError: the device is one GPU by its number, for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield Processes()
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if device != "cuda":
            raise RecipeError(
                f"model.device = {device!r} with several processes: each takes its own GPU; "
                "write 'cuda'"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield _Group()
    finally:
        dist.destroy_process_group()
