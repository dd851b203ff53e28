"""What was found, as a verdict, a table, JSON and one HTML page without outside links."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax.formats.disk import write_report
from lorax.parity.difference import Difference

if TYPE_CHECKING:
    from rich.table import Table

FINGERPRINT = "fingerprint"  # its refusal does not keep the two from being compared

COLOURS = {  # of the quantities, in the order in which they are computed
    "quantizer": "#bbbbbb",
    "4-bit base": "#777777",
    "base": "#66ccee",
    "adapter tensor": "#aa3377",
    "scaling": "#000000",
    "effective weight": "#228833",
    "merged weight": "#ccbb44",
    "output": "#4477aa",
    "logits": "#4477aa",
    "loss": "#4477aa",
    "gradient": "#ee6677",
    "rows": "#332288",  # of whole runs (run_report.py)
    "norm": "#332288",
    "clipped": "#ee8866",
    "rate": "#332288",
    "parameter": "#44aa99",
    "record": "#882255",
}


@dataclass(frozen=True)
class Nearer:
    """||side - exact|| / ||exact||, exact being the effective weight in float64."""

    lorax: float
    peft: float

    def __str__(self) -> str:
        errors = f"lorax {self.lorax:.1e}, PEFT {self.peft:.1e}"
        if self.lorax == self.peft:
            return f"as near to float64 as each other ({errors})"
        return f"nearer to float64: {'lorax' if self.lorax < self.peft else 'PEFT'} ({errors})"


@dataclass(frozen=True)
class Check:
    """One part of one module, held against its twin.

    module: the path, "" for the whole model. part: the tensor's name where there are several.
    bound: of the relative RMS difference, 0 for equality to the bit; source: where it comes from.
    note: why the two differ and which is right, where that is known.
    """

    module: str
    quantity: str
    part: str
    difference: Difference
    bound: float
    source: str
    note: str = ""
    nearer: Nearer | None = None

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return self.difference.equal or 0 < self.bound >= self.difference.relative

    @property
    def said(self) -> str:
        """The note, and which side is nearer to float64."""
        return "; ".join(str(part) for part in (self.note, self.nearer) if part)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None."""
        numbers = {k: _finite(v) for k, v in asdict(self.difference).items()}
        return {
            "module": self.module,
            "quantity": self.quantity,
            "part": self.part,
            "holds": self.holds,
            **numbers,
            "bound": self.bound,
            "note": self.note,
            "nearer": None if self.nearer is None else asdict(self.nearer),
        }


@dataclass(frozen=True)
class Total:
    """All checks of one quantity: how many, how many bit-equal, and the one that is worst."""

    quantity: str
    parts: int
    equal: int
    failed: int
    worst: Check


@dataclass(frozen=True)
class Report:
    """lorax and PEFT over one adapter. It holds if every check does and neither side refused.

    refusals: program -> why it would not load; or "fingerprint" -> what it says against the files,
    and then they are compared nevertheless. refused_tensor: the module and tensor that a refusal
    names. notes: what else there is to know.
    """

    adapter: str
    base: str
    against: str
    quantization: str | None
    tokens: int
    reference: str | None = None
    checks: Sequence[Check] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    refused_tensor: tuple[str, str] = ("", "")
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """The verdict."""
        return bool(self.checks) and not self.refusals and all(c.holds for c in self.checks)

    @property
    def first_difference(self) -> dict[str, Any] | None:
        """Module, quantity, part and note of the first check that does not hold; None if all do."""
        if self.refusals:
            module, part = self.refused_tensor
            note = next(iter(self.refusals.values()))
            quantity = FINGERPRINT if FINGERPRINT in self.refusals else "loading"
            return {"module": module, "quantity": quantity, "part": part, "note": note}
        return self.first_failed

    @property
    def first_failed(self) -> dict[str, Any] | None:
        """The same of the comparison alone."""
        for check in self.checks:
            if not check.holds:
                return {
                    "module": check.module,
                    "quantity": check.quantity,
                    "part": check.part,
                    "note": check.said,
                }
        return None

    @property
    def totals(self) -> list[Total]:
        """A line for each quantity, in the order in which they are computed."""
        groups: dict[str, list[Check]] = {quantity: [] for quantity in COLOURS}
        for check in self.checks:
            groups[check.quantity].append(check)
        return [_total(quantity, group) for quantity, group in groups.items() if group]

    @property
    def first_line(self) -> str:
        """The verdict in one sentence."""
        if self.holds:
            equal = sum(c.difference.equal for c in self.checks)
            return f"holds: {len(self.checks)} parts agree, {equal} of them to the bit"
        first = self.first_difference
        if first is None:
            return "does not hold: nothing was compared"
        return f"does not hold: first at {_where(first)}"

    def __str__(self) -> str:
        lines = [f"{who}: {reason}" for who, reason in self.refusals.items()]
        lines += [f"note: {note}" for note in self.notes]
        first = self.first_failed
        if first is not None and first["note"]:
            lines.append(f"why: {first['note']}")
        if self.refusals and self.checks:
            agree = f"all {len(self.checks)} parts agree between lorax and PEFT"
            lines.append(f"these files: {agree if first is None else f'first at {_where(first)}'}")
        return "\n".join([*lines, self.first_line])

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "holds": self.holds,
            "first_difference": self.first_difference,
            "adapter": self.adapter,
            "base": self.base,
            "reference": self.reference,
            "against": self.against,
            "quantization": self.quantization,
            "tokens": self.tokens,
            "refusals": self.refusals,
            "notes": self.notes,
            "totals": [
                {
                    "quantity": t.quantity,
                    "parts": t.parts,
                    "equal": t.equal,
                    "failed": t.failed,
                    "worst": t.worst.as_dict(),
                }
                for t in self.totals
            ],
            "checks": [check.as_dict() for check in self.checks],
        }

    def write_html(self, path: Path) -> None:
        """Write one page: verdict, picture, tables; nothing in it is loaded from elsewhere.

        Raises:
            EnvironmentProblem: the file cannot be written.
        """
        import jinja2

        loader = jinja2.PackageLoader("lorax.parity", "")
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
        environment.filters["number"] = number
        page = environment.get_template("report.html.jinja").render(
            report=self,
            picture=base64.b64encode(picture(self.checks)).decode() if self.checks else "",
            failed=[c for c in self.checks if not c.holds],
            modules=_by_module(self.checks),
            bounds=list(dict.fromkeys((c.quantity, c.source) for c in self.checks)),
        )
        write_report(path, page.encode())


def _where(first: dict[str, str]) -> str:
    where = ".".join(p for p in (first["module"], first["part"]) if p)
    return f"{where or 'the whole model'} ({first['quantity']})"


def number(value: float | None) -> str:
    """A difference as people read it: 0, 1.2e-07, none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "infinite"
    return "0" if value == 0 else f"{value:.1e}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _total(quantity: str, group: list[Check]) -> Total:
    def badness(check: Check) -> tuple[bool, float]:
        return not check.holds, check.difference.relative

    return Total(
        quantity=quantity,
        parts=len(group),
        equal=sum(check.difference.equal for check in group),
        failed=sum(not check.holds for check in group),
        worst=max(group, key=badness),
    )


def _by_module(checks: Sequence[Check]) -> dict[str, list[Check]]:
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.module, []).append(check)
    return groups


def table(report: Report) -> Table:
    """The totals for a terminal, a line a quantity."""
    columns = ("quantity", "parts", "equal", "fail", "relative", "bound", "max")
    from rich import box
    from rich.table import Table

    made = Table(
        *columns, title=f"lorax against {report.against}", title_justify="left", box=box.SIMPLE
    )
    for t in report.totals:
        worst = t.worst.difference
        made.add_row(
            t.quantity,
            str(t.parts),
            str(t.equal),
            str(t.failed),
            number(worst.relative),
            number(t.worst.bound) if t.worst.bound else "bit-equal",
            number(worst.max),
        )
    return made


def picture(checks: Sequence[Check]) -> bytes:
    """The relative difference of each part by module, in forward order, as PNG.

    A part that does not hold has a red ring.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = {name: place for place, name in enumerate(_by_module(checks)) if name}
    drawn = [c for c in checks if c.module and c.quantity in COLOURS]
    measured = [c.difference.relative for c in drawn if 0 < c.difference.relative < math.inf]
    floor = min([1e-9, *measured]) / 10
    top = max([1e-4, *measured]) * 10
    rows = {q: floor * 1.6**-row for row, q in enumerate(q for q in COLOURS if q != "logits")}

    def points(chosen: list[Check]) -> tuple[list[int], list[float]]:
        """What is equal stands below the floor, a row for each quantity."""
        heights = [min(c.difference.relative, top) or rows[c.quantity] for c in chosen]
        return [places[c.module] for c in chosen], heights

    for quantity, colour in COLOURS.items():
        mine = [c for c in drawn if c.quantity == quantity]
        if mine:
            axes.scatter(*points(mine), s=9, c=colour, label=quantity)
    failed = [c for c in drawn if not c.holds]
    if failed:
        axes.axvline(places[failed[0].module], color="#cc3311", lw=0.8, alpha=0.5)
        ring: dict[str, Any] = {
            "s": 46,
            "facecolors": "none",
            "edgecolors": "#cc3311",
            "linewidths": 1.1,
        }
        axes.scatter(*points(failed), **ring, label="does not hold")
    for quantity in ("output", "logits", "gradient"):  # of a whole run there are gradients only
        bound = next((c.bound for c in checks if c.quantity == quantity), None)
        if bound is not None:
            axes.axhline(bound, color="#999999", lw=0.8, ls="--")
            axes.annotate(f"bound of {quantity}, {bound:.0e}", (0, bound), fontsize=7,
                          color="#666666", xytext=(2, 3), textcoords="offset points")  # fmt: skip
            break
    axes.set_yscale("log")
    axes.axhspan(min(rows.values()) / 2, floor * 1.6, color="#f3f3f3", lw=0, zorder=0)
    axes.set_ylim(min(rows.values()) / 2, top * 2)
    axes.set_xlabel("module, in forward order")
    axes.set_ylabel("relative RMS difference (grey: equal)")
    names = list(places)
    marks = sorted({round(i * (len(names) - 1) / 6) for i in range(7)}) if names else []
    axes.set_xticks(
        [places[names[m]] for m in marks], [_short(names[m]) for m in marks], fontsize=7
    )
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _short(name: str) -> str:
    """layers.3.self_attn.q_proj -> 3.q_proj."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return ".".join([*numbers[:1], parts[-1]])
