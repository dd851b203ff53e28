"""What the replay of a run found: checks as elsewhere, each of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorax.parity.report import Check, Report

# Of a step, in the order in which it computes them.
ORDER = (
    "adapter tensor",
    "rows",
    "loss",
    "gradient",
    "norm",
    "clipped",
    "rate",
    "parameter",
    "record",
)


@dataclass(frozen=True)
class StepCheck(Check):
    """A check of one optimizer step; step 0 is the start."""

    step: int = 0

    def as_dict(self) -> dict[str, Any]:
        """With the step."""
        return {"step": self.step, **super().as_dict()}


@dataclass(frozen=True)
class RunReport(Report):
    """A run's first steps in lorax, in PEFT, and on record.

    adapter: the run's directory. steps: how many were replayed.
    """

    steps: int = 0

    @property
    def first_failed(self) -> dict[str, Any] | None:
        """Step, module, quantity, part and note of the first check that does not hold.

        Where that is one of the whole step (its rows, its rate), module and part are those of the
        first tensor that it moved.
        """
        failed = [c for c in self.checks if isinstance(c, StepCheck) and not c.holds]
        if not failed:
            return None
        first = failed[0]
        moved = next((c for c in failed if c.step == first.step and c.module), first)
        return {
            "step": first.step,
            "module": moved.module,
            "quantity": first.quantity,
            "part": moved.part,
            "note": first.note,
        }

    @property
    def first_line(self) -> str:
        """The verdict in one sentence."""
        first = self.first_difference
        if self.holds:
            equal = sum(c.difference.equal for c in self.checks)
            return (
                f"holds: the first {self.steps} steps are PEFT's within rounding: "
                f"{len(self.checks)} parts agree, {equal} of them to the bit"
            )
        if first is None or "step" not in first:
            return super().first_line
        where = ".".join(p for p in (first["module"], first["part"]) if p) or "the whole model"
        return f"does not hold: first at step {first['step']}, {where} ({first['quantity']})"

    def as_dict(self) -> dict[str, Any]:
        """With the number of steps."""
        return {**super().as_dict(), "run": self.adapter, "steps": self.steps}
