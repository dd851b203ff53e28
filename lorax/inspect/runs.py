"""Where two runs part: the first step, and the first of batch, random state, gradients, parameters.

The quantities are looked at in the order in which a step makes them, so the first difference is the
cause and the others are what follows from it:

    batch        other rows, or another order
    random       dropout draws other numbers
    gradients    the same input, another forward or backward: the tensor is named
    parameters   the same gradients, another optimizer step
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorax.errors import FormatError
from lorax.formats.json_files import parse_json

FILE = "digests.jsonl"
ORDER = ("batch", "random", "gradients", "parameters")


@dataclass(frozen=True)
class RunsReport:
    """Where two runs part.

    steps: those that both have and that were compared. step, quantity, tensors: the first
    difference; None and empty where there is none.
    """

    first: str
    second: str
    steps: int
    step: int | None = None
    quantity: str | None = None
    tensors: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the two are the same, as far as both go."""
        return self.step is None

    @property
    def verdict(self) -> str:
        """In one line."""
        if self.step is None:
            return f"the {self.steps} steps that both have are the same, bit for bit"
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        of = f": {self.tensors[0]}{more}" if self.tensors else ""
        return f"step {self.step} is the first that differs, in its {self.quantity}{of}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "holds": self.holds}


def compare_runs(first: Path, second: Path) -> RunsReport:
    """Hold the digests of two runs against each other.

    Raises:
        FormatError: a run has none, or they are damaged, or they share no step.
    """
    ours, theirs = _read(first), _read(second)
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        raise FormatError(f"{first} and {second}: no step is in both; expected runs of one recipe")
    for step in shared:
        for quantity in ORDER:
            one, two = ours[step].get(quantity), theirs[step].get(quantity)
            if one != two:
                names = _differing(one, two)
                return RunsReport(str(first), str(second), len(shared), step, quantity, names)
    return RunsReport(str(first), str(second), len(shared))


def _differing(one: Any, two: Any) -> tuple[str, ...]:
    if not isinstance(one, dict) or not isinstance(two, dict):
        return ()
    names = [*one, *(name for name in two if name not in one)]
    return tuple(name for name in names if one.get(name) != two.get(name))


def _read(run: Path) -> dict[int, dict[str, Any]]:
    path = run / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); expected the digests of a run with "
            "train.digests = true"
        ) from None
    complete = text[: text.rfind("\n") + 1]
    lines = [parse_json(x, f"{path}:{i}") for i, x in enumerate(complete.splitlines(), 1)]
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise FormatError(f"{path}: a line has no step; expected what train.digests writes")
    return {line["step"]: line for line in lines}
