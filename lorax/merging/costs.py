"""What a route of merging costs: of the weights by layer, and of the logits on text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorax.merging.routes import (
    LayerCost,
    Route,
)

KL_CHUNK = 64  # tokens whose float64 probabilities are held at a time


@dataclass(frozen=True)
class LogitsCost:
    """How far a route moves the model, on text.

    kl: the mean over tokens of KL(unmerged || merged), nats; kl_worst: the largest token's.
    moved: RMS of the logits' difference / RMS of the unmerged logits; of_effect: / RMS of how far
    the adapter moves them.
    """

    kl: float
    kl_worst: float
    moved: float
    of_effect: float


@dataclass(frozen=True)
class RouteCost:
    """What a route costs: by adapted layer; on text, if that was measured; and bytes to store."""

    route: Route
    layers: dict[str, LayerCost]
    nbytes: int = 0
    logits: LogitsCost | None = None

    @property
    def share(self) -> float:
        """Of the adapter's effect on all layers together, what is lost (not finite: infinity)."""
        lost, effect = (
            math.hypot(*(getattr(cost, part) for cost in self.layers.values()))
            for part in ("lost", "effect")
        )
        return _sortable(lost / effect if effect else 0.0)

    @property
    def loss(self) -> float:
        """What routes are chosen by: KL where it was measured, else the share."""
        return self.share if self.logits is None else _sortable(self.logits.kl)

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that loses the largest share, and that share."""
        name = max(self.layers, key=lambda name: _sortable(self.layers[name].share))
        return name, self.layers[name].share

    @property
    def captured(self) -> float | None:
        """Of the square of what quantizing lost, what the residual holds, all layers together."""
        found = [c for c in self.layers.values() if c.captured is not None]
        before = sum(c.lost**2 / (1 - c.captured) for c in found if c.captured not in (None, 1.0))
        rest = sum(c.lost**2 for c in found)
        return None if not found else (1 - rest / before if before else 1.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite is null."""
        name, share = self.worst
        layers = {n: finite(cost.share) for n, cost in self.layers.items()}
        found: dict[str, Any] = {"route": self.route.name, "lost": finite(self.share)}
        found |= {"worst_layer": name, "worst_lost": finite(share), "captured": self.captured}
        found |= {"nbytes": self.nbytes, "layers": layers}
        for key in ("kl", "kl_worst", "moved", "of_effect"):
            found[key] = None if self.logits is None else finite(getattr(self.logits, key))
        return found


@dataclass(frozen=True)
class Report:
    """All routes, and how large the adapter itself is on the same text."""

    tokens: int
    routes: list[RouteCost]
    adapter: LogitsCost  # of leaving the adapter out


def logits_cost(unmerged: Tensor, merged: Tensor, effect: float) -> LogitsCost:
    """Compare logits (rows, T, V); effect: how far the adapter moves them, ||difference||."""
    p, q = unmerged.flatten(0, -2), merged.flatten(0, -2)
    kl = torch.cat([_kl(*pair) for pair in zip(p.split(KL_CHUNK), q.split(KL_CHUNK), strict=True)])
    moved = distance(merged, unmerged)
    size = torch.linalg.vector_norm(unmerged, dtype=torch.float64).item()
    return LogitsCost(
        kl=kl.mean().item(),
        kl_worst=kl.max().item(),
        moved=moved / size,
        of_effect=moved / effect if effect else 0.0,
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) by row, nats, float64, of logits (n, V)."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b||, summed in float64."""
    return torch.linalg.vector_norm(a - b, dtype=torch.float64).item()


def _sortable(x: float) -> float:
    """NaN as infinity: what overflowed loses most."""
    return math.inf if math.isnan(x) else x


def finite(x: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return x if math.isfinite(x) else None
