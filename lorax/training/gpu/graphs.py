"""A micro-batch's forward, loss and backward as one CUDA graph for each bucket of lengths.

A layer of 8 billion parameters' model is some 90 launches, a step 3,000; a graph gives them to the
GPU in one call. What a graph reads and writes stays in its place:

    ids, labels   (B, T), T rounded up to BUCKET: padded with tokens that no loss counts, which
                  causal attention hides from all before them
    scale, seed   1 / tokens of the step, and dropout's seed: written before each replay
    gradients     one buffer a parameter, which all graphs add to; `p.grad` is that buffer

A graph holds as long as what it was made from: the same parameters in their places, modules
switched as they were, nobody watching. That is asked before each replay. At most MOST graphs are
kept, in one pool of memory. What cannot be captured (packed documents, whose lengths differ each
time; a layer that is not known; a head that is trained) is computed without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorax.backend import uses_triton
from lorax.kernels.capture import Capture, CudaCapture
from lorax.models import Model
from lorax.models.watched import is_watched
from lorax.training.fused_loss import cross_entropy_frozen_head
from lorax.training.gpu import seeds

if TYPE_CHECKING:
    from lorax.data.batches import MicroBatch

BUCKET, MOST = 128, 8
IGNORED = -100

log = logging.getLogger("lorax")


@dataclass
class Graph:
    """One captured bucket: what it reads, its loss (before scaling), and how to replay it."""

    ids: Tensor
    labels: Tensor
    loss: Tensor
    replay: Callable[[], None]


class StepGraphs:
    """The graphs of one model while a run lasts.

    capture: makes a replay of a function; a test may give one that runs it again.
    """

    def __init__(self, model: Model, capture: Capture | None = None):
        self.model = model
        device = next(model.parameters()).device
        self.capture = CudaCapture() if capture is None else capture
        self.scale = torch.zeros((), device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.buffers = [torch.zeros_like(p) for p in self.trained]
        self.graphs: dict[Any, Graph] = {}
        self.failed = False

    def add(self, batch: MicroBatch, tokens: int) -> Tensor | None:
        """Add the batch's gradients of its summed loss / tokens; that loss, () float32.

        None, and nothing is changed, where no graph computes this batch.
        """
        if self.failed or batch.documents is not None or not self._is_known():
            return None
        key = self._key(batch.input_ids)
        if key not in self.graphs and (len(self.graphs) >= MOST or not self._add_graph(key, batch)):
            return None
        graph = self.graphs[key]
        self._attach()
        self._fill(graph, batch, tokens)
        graph.replay()
        return graph.loss * self.scale

    def _key(self, ids: Tensor) -> Any:
        """What a graph was made for, and made from."""
        switches = [
            (m.enabled, m.merged is None, m.scaling, m.dropout)
            for m in self.model.modules()
            if hasattr(m, "merged") and hasattr(m, "scaling")
        ]
        places = [p.data_ptr() for p in self.trained]
        state = self.model.training, self.model.gradient_checkpointing
        return (len(ids), _bucket(ids.shape[1]), *state, tuple(switches), tuple(places))

    def _is_known(self) -> bool:
        """Whether loss and head are the plain ones, over modules that nobody watches."""
        model, head = self.model, self.model.lm_head
        plain = type(model).logits is Model.logits and model.logit_cap is None
        frozen = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        same = [p for p in model.parameters() if p.requires_grad]
        unchanged = len(same) == len(self.trained)
        unchanged = unchanged and all(a is b for a, b in zip(same, self.trained, strict=True))
        return plain and frozen and unchanged and not any(is_watched(m) for m in model.modules())

    def _attach(self) -> None:
        """Make `p.grad` the buffer that graphs add to, with what p.grad holds."""
        empty = [b for p, b in zip(self.trained, self.buffers, strict=True) if p.grad is None]
        if empty:
            torch._foreach_zero_(empty)
        for parameter, buffer in zip(self.trained, self.buffers, strict=True):
            if parameter.grad is not None and parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer

    def _fill(self, graph: Graph, batch: MicroBatch, tokens: int) -> None:
        T = batch.input_ids.shape[1]
        graph.ids[:, :T].copy_(batch.input_ids)
        graph.ids[:, T:].zero_()
        graph.labels[:, :T].copy_(batch.labels)
        graph.labels[:, T:].fill_(IGNORED)
        self.scale.fill_(1 / tokens)
        if seeds.drops(self.model):
            self.seed.fill_(seeds.drawn())

    def _add_graph(self, key: Any, batch: MicroBatch) -> bool:
        """Capture the bucket of this batch; False, and no more graphs, where that fails."""
        B, T = len(batch.input_ids), _bucket(batch.input_ids.shape[1])
        ids = batch.input_ids.new_zeros(B, T)
        labels = torch.full_like(ids, IGNORED)
        graph = Graph(ids, labels, torch.zeros((), device=ids.device), lambda: None)
        before = [None if p.grad is None else p.grad.clone() for p in self.trained]
        self._attach()
        try:
            graph.replay = self.capture(lambda: self._run(graph))
        except (RuntimeError, _NotKnown) as error:
            log.warning("steps are computed without a CUDA graph: %s", str(error).split("\n")[0])
            self.failed = True
        for parameter, gradient in zip(self.trained, before, strict=True):
            parameter.grad = gradient  # what warming up has added is gone
        if not self.failed:
            self.graphs[key] = graph
        return not self.failed

    def _run(self, graph: Graph) -> None:
        """What is captured: the gradients of graph.ids and graph.labels, added to the buffers."""
        model = self.model
        with seeds.held(model.body, self.seed), seeds.counted(model.body) as layers:
            hidden = model.hidden_states(graph.ids)[:, :-1].flatten(0, 1)  # (B (T - 1), C)
        if len(layers) < model.config.sizes.layers:
            raise _NotKnown("a layer has something that the hand-written step does not compute")
        targets = graph.labels[:, 1:].flatten()
        head = model.lm_head.weight
        assert isinstance(head, Tensor)
        loss = cross_entropy_frozen_head(hidden, head, targets)
        loss.backward(self.scale)
        graph.loss.copy_(loss.detach())


def step_graphs(model: Model) -> StepGraphs | None:
    """For a model on CUDA, whose kernels are Triton's; else None."""
    first = next(model.parameters())
    return StepGraphs(model) if first.is_cuda and uses_triton(first) else None


class _NotKnown(Exception):
    pass


def _bucket(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
