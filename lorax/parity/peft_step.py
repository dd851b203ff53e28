"""Training steps in PEFT over transformers, as `lorax verify --run` holds them against lorax's.

Written for itself: rows are padded here, the loss comes from transformers' logits, clipping and the
optimizer are torch's, rates behind the warm-up are those of transformers' schedulers, and LoRA+'s
groups are PEFT's. Only the rule of the rows' order and the line of the warm-up, which are lorax's
own, are stated once more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.data.examples import Example
from lorax.parity.sides import PeftSide
from lorax.training.recipe import TrainSection


def rows_of_steps(rows: Sequence[Example], batch_size: int, seed: int, shuffle: bool) -> Iterator:
    """The rows of each step: every epoch in the order that `random.Random(seed epoch)` shuffles."""
    epoch = 0
    while True:
        order = list(range(len(rows)))
        if shuffle:
            random.Random(f"{seed} {epoch}").shuffle(order)
        for start in range(0, len(order), batch_size):
            yield [rows[i] for i in order[start : start + batch_size]]
        epoch += 1


class PeftSteps:
    """A PeftModel, its optimizer and its schedule.

    total, warmup: of the whole run, in steps.
    """

    def __init__(self, side: PeftSide, settings: TrainSection, total: int, warmup: int):
        self.side, self.settings = side, settings
        self.total, self.warmup = total, warmup
        own = {p.data_ptr(): p for p in side.root.parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = {
            name: own[t.data_ptr()] for name, t in side.tensors().items() if t.data_ptr() in own
        }
        self.optimizer = self._optimizer()
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuned = [m for m in side.root.modules() if isinstance(m, BaseTunerLayer)]
        for module in (part for layer in tuned for part in layer.modules()):
            module.training = True  # the adapter's dropout; the base has none in lorax

    def gradients(
        self, rows: Sequence[Example], generator: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        """One step's loss and its gradients, not yet clipped.

        generator: the state of torch's random numbers from which dropout draws.
        """
        tokens, loss = sum(sum(row.trained[1:]) for row in rows), 0.0
        self.optimizer.zero_grad()
        before = torch.get_rng_state()
        torch.set_rng_state(generator)
        try:
            for part in self._micro_batches(rows):
                summed = self._summed_loss(part) / tokens
                summed.backward()
                loss += summed.item()
        finally:
            torch.set_rng_state(before)
        return loss, self._copied()

    def clip(self, gradients: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The norm of these gradients, and what torch's clipping makes of them."""
        self._take(gradients)
        most = self.settings.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), most).item()
        return norm, self._copied()

    def step(self, number: int, gradients: dict[str, Tensor]) -> float:
        """Torch's AdamW over these gradients at the rate of step `number` (from 1); that rate."""
        factor = self._factor(number - 1)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor
        self._take(gradients)
        self.optimizer.step()
        return self.settings.learning_rate * factor

    def stand_at(self, tensors: dict[str, Tensor]) -> None:
        """Take over these values, so that roundings do not pile up over the steps."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def _take(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone() if name in gradients else None

    def _copied(self) -> dict[str, Tensor]:
        named = self.parameters.items()
        return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}

    def _micro_batches(self, rows: Sequence[Example]) -> Iterator[Sequence[Example]]:
        longest_first = sorted(rows, key=lambda row: -len(row.ids))
        size = self.settings.micro_batch_size
        for start in range(0, len(rows), size):
            yield longest_first[start : start + size]

    def _summed_loss(self, rows: Sequence[Example]) -> Tensor:
        """-log p of the trained tokens, in float64 from the logits (see `PeftSide`)."""
        width = max(len(row.ids) for row in rows)
        ids, mask, labels = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        labels -= 100
        for i, row in enumerate(rows):
            length = len(row.ids)
            ids[i, :length] = torch.tensor(row.ids)
            mask[i, :length] = 1
            for place, trained in enumerate(row.trained):
                if trained:
                    labels[i, place] = row.ids[place]
        logits = self.side.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        counted = labels[:, 1:] != -100
        return F.cross_entropy(logits[counted].double(), labels[:, 1:][counted], reduction="sum")

    def _optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        more: dict[str, Any] = {"betas": (s.adam_beta1, s.adam_beta2), "eps": s.adam_epsilon}
        if s.lora_plus_ratio is None:
            own, rate = list(self.parameters.values()), s.learning_rate
            more |= {"lr": rate, "weight_decay": s.weight_decay, "foreach": False}
            return torch.optim.AdamW(own, **more)
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            self.side.model,
            torch.optim.AdamW,
            lr=s.learning_rate,
            loraplus_lr_ratio=s.lora_plus_ratio,
            loraplus_weight_decay=s.weight_decay,
            **more,
        )

    def _factor(self, step: int) -> float:
        """The share of the peak rate at `step` (from 0)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        from transformers import get_scheduler

        unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        made: Any = get_scheduler(self.settings.lr_scheduler, unused, self.warmup, self.total)
        return float(made.lr_lambdas[0](step))
