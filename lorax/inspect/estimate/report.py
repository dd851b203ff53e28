"""Estimates for people: a line, tables, a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from lorax.inspect.estimate.peak import CARDS, Estimate

_NAMES = {
    "weights": "base weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits",
    "other": "process, scratch, heap",
}


def size(nbytes: int) -> str:
    """In GB, or MB below one: "36.1 GB"."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:,.1f} MB"


def line(found: Estimate) -> str:
    """One line, as `lorax train` prints it."""
    parts = asdict(found.parts)
    largest = sorted(parts, key=parts.__getitem__, reverse=True)[:3]
    most = ", ".join(f"{_NAMES[name]} {size(parts[name])}" for name in largest)
    return f"about {size(found.peak_bytes)} at the most ({most})"


def to_json(found: Estimate | Sequence[Estimate]) -> str:
    """One object of one estimate, a list of several."""
    if isinstance(found, Estimate):
        return json.dumps(found.as_dict())
    return json.dumps([one.as_dict() for one in found])


def parts(found: Estimate) -> Iterator[str | Table]:
    """One estimate for a terminal."""
    share = 100 * found.trainable / found.parameters
    yield f"{found.setting.line}, on {found.setting.device}"
    yield (
        f"trainable params: {found.trainable:,} || all params: {found.parameters:,} || "
        f"trainable%: {share:.4f}"
    )
    kinds = Table("parameters of", "count")
    for kind, count in found.kinds.items():
        kinds.add_row(kind, f"{count:,}")
    if found.setting.adapter is not None:
        kinds.add_row("adapter", f"{found.parameters - sum(found.kinds.values()):,}")
    yield kinds
    held = Table("memory of", "bytes", "")
    for name, nbytes in asdict(found.parts).items():
        held.add_row(_NAMES[name], f"{nbytes:,}", size(nbytes))
    held.add_row("at the most at once", f"{found.peak_bytes:,}", size(found.peak_bytes))
    yield held
    yield from _note(found)


def table(found: Sequence[Estimate]) -> Iterator[str | Table]:
    """Several ways to train one model, beside each other, and the smallest card that holds each."""
    shapes = {one.setting.shape for one in found}
    title = ["memory in GB, parameters in millions"]
    yield "; ".join([*shapes, *title] if len(shapes) == 1 else title)
    made = Table("method")
    for column in ("trained", "weights", "states", "a pass", "peak", "fits in"):
        made.add_column(column, no_wrap=True, justify="right")
    for one in found:
        held = one.parts
        states = held.adapter + held.gradients + held.optimizer
        numbers = (held.weights, states, held.activations + held.logits, one.peak_bytes)
        fits = next((f"{card} GB" for card in CARDS if one.fits(card)), "none")
        words = [one.setting.words] + ([one.setting.shape] if len(shapes) > 1 else [])
        trained = f"{one.trainable / 1e6:,.1f}"
        made.add_row(", ".join(words), trained, *(f"{n / 1e9:,.2f}" for n in numbers), fits)
    yield made
    yield f"fits in: the smallest of {', '.join(map(str, CARDS))} GB"
    yield from _note(found[0])


def _note(found: Estimate) -> Iterator[str]:
    if found.setting.device == "cpu":
        return
    yield (
        "of a GPU: the tensors alone, as the plain step holds them; CUDA's own context comes on "
        "top, some hundreds of MB"
    )


def plot(found: Sequence[Estimate], path: Path) -> None:
    """A bar for each estimate, in its parts; lines where a GPU's memory ends. Written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.45 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = [one.setting.line for one in found]
    left = [0.0] * len(found)
    for name, title in _NAMES.items():
        widths = [asdict(one.parts)[name] / 1e9 for one in found]
        axes.barh(labels, widths, left=left, label=title)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    peaks = [one.peak_bytes / 1e9 for one in found]
    axes.plot(peaks, labels, "k|", markersize=14, label="at the most at once")
    for card in CARDS:
        if card < 1.1 * max(left):
            axes.axvline(card, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.invert_yaxis()
    axes.set_xlabel("GB; dashed: where 8, 16, 24, 48 and 80 GB end")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)
