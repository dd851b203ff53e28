"""What each format and block size costs a model's weights: `lorax inspect quantization`.

For every Linear that would be quantized: bits a weight (scales included), the mean absolute error,
the RMS error relative to the tensor's own RMS, and the rows that come off worst.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lorax.formats.disk import write_report
from lorax.formats.huggingface import load_model, quantizable
from lorax.quant.quantize import quantize

WORST_ROWS = 3


@dataclass(frozen=True)
class TensorError:
    """One tensor in one format.

    stored_as: the format that it got, which differs from `format` where double quantization was
        not safe.
    mean_error: mean |back - w|, in the weights' unit; relative_rms: ||back - w|| / ||w||.
    worst_rows: (row, its ||back - w|| / ||w||), the worst first.
    """

    name: str
    format: str
    block_size: int
    stored_as: str
    weights: int
    nbytes: int
    mean_error: float
    relative_rms: float
    squared_error: float
    squared_size: float
    worst_rows: list[tuple[int, float]]

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Total:
    """All tensors of a model in one format."""

    format: str
    block_size: int
    tensors: int
    weights: int
    nbytes: int
    bits: float
    mean_error: float
    relative_rms: float
    fallbacks: int


def measure(weight: Tensor, format: str, block_size: int, name: str) -> TensorError:
    """Quantize one weight (out, in) and measure what comes back, in float32."""
    q = quantize(weight, format, block_size, name=name)
    w = weight.float()
    difference = q.dequantize(torch.float32).sub_(w)
    rows = difference.norm(dim=1) / w.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    worst = rows.topk(min(WORST_ROWS, len(rows)))
    squared_error, squared_size = (
        t.square().sum(dtype=torch.float64).item() for t in (difference, w)
    )
    return TensorError(
        name=name,
        format=format,
        block_size=block_size,
        stored_as=q.format,
        weights=weight.numel(),
        nbytes=q.nbytes,
        mean_error=difference.abs().mean(dtype=torch.float64).item(),
        relative_rms=(squared_error / squared_size) ** 0.5 if squared_size else 0.0,
        squared_error=squared_error,
        squared_size=squared_size,
        worst_rows=list(zip(worst.indices.tolist(), worst.values.tolist(), strict=True)),
    )


def inspect_quantization(
    path: str | os.PathLike[str],
    formats: Sequence[str],
    block_sizes: Sequence[int],
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TensorError]:
    """Measure every Linear of a model in each format and block size."""
    model = load_model(path, dtype)
    linears = [(n, m) for n, m in model.named_modules() if quantizable(n, m)]
    cases = [(f, b) for f in formats for b in block_sizes]
    errors = []
    for done, (name, module) in enumerate(linears):
        progress(done, len(linears))
        weight = module.weight
        assert isinstance(weight, Tensor)
        errors += [measure(weight.detach(), f, b, f"{name}.weight") for f, b in cases]
    progress(len(linears), len(linears))
    return errors


def totals(errors: Iterable[TensorError]) -> list[Total]:
    """Sum up by format and block size, in the order of appearance."""
    groups: dict[tuple[str, int], list[TensorError]] = {}
    for error in errors:
        groups.setdefault((error.format, error.block_size), []).append(error)
    return [_total(group) for group in groups.values()]


def _total(group: list[TensorError]) -> Total:
    weights, nbytes = sum(e.weights for e in group), sum(e.nbytes for e in group)
    size = sum(e.squared_size for e in group)
    return Total(
        format=group[0].format,
        block_size=group[0].block_size,
        tensors=len(group),
        weights=weights,
        nbytes=nbytes,
        bits=8 * nbytes / weights,
        mean_error=sum(e.mean_error * e.weights for e in group) / weights,
        relative_rms=(sum(e.squared_error for e in group) / size) ** 0.5 if size else 0.0,
        fallbacks=sum(e.stored_as != e.format for e in group),
    )


def table(errors: Sequence[TensorError]) -> Table:
    """A line for each format and block size, with the row that comes off worst in it."""
    made = Table(
        "format", "block", "bits", "MB", "mean error", "RMS error", "fallbacks", "worst row"
    )
    for total in totals(errors):
        worst = max(_of(total, errors), key=lambda error: error.worst_rows[0][1])
        row, error = worst.worst_rows[0]
        made.add_row(
            total.format,
            str(total.block_size),
            f"{total.bits:.3f}",
            f"{total.nbytes / 1e6:.1f}",
            f"{total.mean_error:.3e}",
            f"{100 * total.relative_rms:.2f} %",
            str(total.fallbacks),
            f"{100 * error:.1f} % {worst.name} [{row}]",
        )
    return made


def lines(errors: Sequence[TensorError]) -> list[str]:
    """A line for each tensor in each format and block size."""
    found = []
    for e in errors:
        rows = ", ".join(f"{row}: {100 * error:.1f} %" for row, error in e.worst_rows)
        found.append(
            f"{e.name}  {e.format}/{e.block_size}  {e.bits:.3f} bits  mean {e.mean_error:.3e}  "
            f"RMS {100 * e.relative_rms:.2f} %  worst rows {rows}"
        )
    return found


def _of(total: Total, errors: Sequence[TensorError]) -> list[TensorError]:
    case = (total.format, total.block_size)
    return [error for error in errors if (error.format, error.block_size) == case]


def as_dict(errors: Sequence[TensorError]) -> dict[str, Any]:
    """Everything: {"totals": [...], "tensors": [...]}."""
    tensors = [{**asdict(error), "bits": error.bits} for error in errors]
    return {"totals": [asdict(t) for t in totals(errors)], "tensors": tensors}


def plot(errors: Sequence[TensorError], path: Path) -> None:
    """Draw the relative RMS error of each tensor, in the model's order, a line a format, as PNG.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for total in totals(errors):
        mine = [100 * e.relative_rms for e in _of(total, errors)]
        label = f"{total.format}, blocks of {total.block_size}: {total.bits:.3f} bits"
        style = ".--" if total.format.endswith("-dq") else ".-"
        axes.plot(range(len(mine)), mine, style, lw=0.8, ms=3, label=label)
    axes.set_xlabel("tensor, in the model's order")
    axes.set_ylabel("RMS error (% of the tensor's RMS)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_report(path, data.getvalue())
