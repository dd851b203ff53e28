"""The merge laboratory's findings as tables, lines and JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from lorax.merging.costs import Report, RouteCost, finite
from lorax.merging.files import RESIDUAL
from lorax.merging.laboratory import Laboratory


def as_dict(
    laboratory: Laboratory, report: Report | None, chosen: RouteCost, output: Path | None
) -> dict[str, Any]:
    """Everything for JSON: the routes, if there is a report; which was chosen, and written."""
    found: dict[str, Any] = {
        "base": laboratory.model.name_or_path,
        "quantization": laboratory.quantization,
        "route": chosen.route.name,
        "lost": finite(chosen.share),
        "output": None if output is None else str(output),
    }
    if report is not None:
        found |= {"tokens": report.tokens, "adapter_kl": report.adapter.kl}
        found |= {"adapter_moved": report.adapter.moved}
        found["routes"] = [cost.as_dict() for cost in report.routes]
    return found


def summary(laboratory: Laboratory, chosen: RouteCost) -> str:
    """What was chosen and what it costs, in one line."""
    name, worst = chosen.worst
    over = f"dequantized {laboratory.quantization}" if laboratory.quantization else "the base"
    if chosen.route.original:
        over = "the original"
    kind = f"{over}, quantized again" if chosen.route.format else over
    if not any(cost.effect for cost in chosen.layers.values()):
        return (
            f"route {chosen.route.name} ({kind}): the adapter changes nothing in its "
            f"{len(chosen.layers)} layers"
        )
    return (
        f"route {chosen.route.name} ({kind}): {len(chosen.layers)} layers lose "
        f"{_percent(chosen.share)} of the adapter's effect, {_percent(worst)} at most ({name})"
    )


def written(chosen: RouteCost, output: Path | None) -> list[str]:
    """What was written, in lines."""
    if output is None:
        return []
    lines = [f"wrote {output}"]
    if chosen.route.residual_rank:
        lines.append(f"wrote {output / RESIDUAL}: the residual adapter, to be loaded over it")
    return lines


def tables(report: Report) -> list[Table]:
    """All routes side by side with the one that loses least first; then by layer."""
    names = [cost.route.name for cost in report.routes]
    layers = Table("layer: lost of the adapter's effect", *names)
    for layer in report.routes[0].layers:
        shares = [_percent(cost.layers[layer].share) for cost in report.routes]
        layers.add_row(layer, *shares)
    whole = Table(
        "route", "lost", "worst layer", "KL, nats a token", "largest", "logits moved", "MB",
        caption=f"lost and moved: of what the adapter itself does; KL on {report.tokens} tokens",
    )  # fmt: skip
    for cost in sorted(report.routes, key=lambda cost: cost.loss):
        assert cost.logits is not None
        whole.add_row(
            cost.route.name,
            _percent(cost.share),
            _percent(cost.worst[1]),
            f"{cost.logits.kl:.2e}",
            f"{cost.logits.kl_worst:.2e}",
            _percent(cost.logits.of_effect),
            f"{cost.nbytes / 1e6:.1f}",
        )
    adapter = report.adapter
    whole.add_row("no adapter", "100 %", "100 %", f"{adapter.kl:.2e}", f"{adapter.kl_worst:.2e}",
                  "100 %", "")  # fmt: skip
    return [whole, layers]


def _percent(share: float) -> str:
    """Three digits, small ones as powers of ten."""
    if not math.isfinite(share):
        return "overflow"
    if share >= 10:
        return f"{100 * share:,.0f} %"
    return f"{100 * share:.3g} %" if share >= 1e-4 or share == 0 else f"{100 * share:.1e} %"
