"""What a run's optimizer holds and what paging has moved: `lorax inspect optimizer`.

    RUN/config.toml        which optimizer the recipe chose
    RUN/metrics.jsonl      the paging counters, on the line of each step that had something managed
    RUN/checkpoints/...    the state: the newest checkpoint's file, of which only the header is read

A checkpoint's directory or a state's file can be given alone; counters are then not to be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

from rich.table import Table

from lorax.errors import EnvironmentProblem, FormatError
from lorax.formats.json_files import parse_json
from lorax.formats.optimizer_files import StateTensor, find_optimizer_state, read_state_header
from lorax.optim.paged import PagingCounters
from lorax.training.recipe import Recipe

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StatePart:
    """All tensors of one name and dtype (exp_avg in uint8, ...) of a state."""

    name: str
    dtype: str
    tensors: int
    values: int
    nbytes: int


@dataclass(frozen=True)
class OptimizerReport:
    """What there is to say about an optimizer.

    optimizer: the recipe's name for it; None where only a state was given.
    state_file: where `state` was read; None where none has been saved.
    parameters: the values that have moments; 0 without a state.
    paging: what was moved, over all resumes; zeros where nothing was paged; None without metrics.
    """

    path: str
    optimizer: str | None
    steps: int | None
    state_file: str | None
    state: list[StatePart]
    parameters: int
    paging: PagingCounters | None

    @property
    def state_bytes(self) -> int:
        """The bytes of all tensors of the state."""
        return sum(part.nbytes for part in self.state)

    @property
    def verdict(self) -> str:
        """Whether anything was paged, and why not, in one sentence."""
        if self.paging is None:
            return "paging: unknown; its counters stand in a run's metrics.jsonl"
        if self.paging.managed_bytes:
            return f"paging: {self.paging.managed_bytes:,} bytes managed"
        if self.optimizer is None or self.optimizer.startswith("paged-"):
            return "paging: 0 bytes managed; without a CUDA device states lie in ordinary memory"
        return f"paging: 0 bytes managed; {self.optimizer} is not paged (paged-{self.optimizer} is)"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "state_bytes": self.state_bytes}


def inspect_optimizer(path: str | Path) -> OptimizerReport:
    """Look at a run's directory, a checkpoint's directory, or an optimizer state's file.

    Raises:
        EnvironmentProblem: there is no such path.
        FormatError: it is none of the three, or one of its files is damaged.
        RecipeError: the run's config.toml cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return _report(path, path)
    if not path.is_dir():
        raise EnvironmentProblem(
            f"{path}: no such file or directory; give a run's directory, a checkpoint's, or a "
            "state's file"
        )
    if (path / METRICS).is_file():
        return _report(path, _newest_state(path), run=True)
    state_file = find_optimizer_state(path)
    if state_file is None:
        raise FormatError(
            f"{path}: neither {METRICS} nor an optimizer's state is in it; expected a run's "
            "directory, a checkpoint's, or a state's file"
        )
    return _report(path, state_file)


def _report(path: Path, state_file: Path | None, run: bool = False) -> OptimizerReport:
    tensors = read_state_header(state_file) if state_file else []
    config = path / "config.toml"
    lines = list(_step_lines(path / METRICS)) if run else []
    return OptimizerReport(
        path=str(path),
        optimizer=Recipe.load(config).train.optimizer if run and config.is_file() else None,
        steps=int(lines[-1]["step"]) if lines else None,
        state_file=str(state_file) if state_file else None,
        state=_parts(tensors),
        parameters=sum(t.values for t in tensors if t.name == "exp_avg"),
        paging=add_up(lines) if run else None,
    )


def _newest_state(run: Path) -> Path | None:
    """The state in the newest checkpoint that has one."""
    for directory in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        found = find_optimizer_state(directory)
        if found is not None:
            return found
    return None


def _parts(tensors: Iterable[StateTensor]) -> list[StatePart]:
    groups: dict[tuple[str, str], list[StateTensor]] = {}
    for tensor in tensors:
        key = (tensor.name, str(tensor.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(tensor)
    return [
        StatePart(name, dtype, len(ts), sum(t.values for t in ts), sum(t.nbytes for t in ts))
        for (name, dtype), ts in sorted(groups.items())
    ]


def _step_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that tell a step; a last one without its end is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: cannot be read ({error}); expected the metrics of a run, in UTF-8"
        ) from None
    complete = text[: text.rfind("\n") + 1]
    for number, content in enumerate(complete.splitlines(), 1):
        line = parse_json(content, f"{path}:{number}")
        if "loss" not in line:
            continue
        for name in ("step", *(field.name for field in fields(PagingCounters))):
            value = line.get(name, None if name == "step" else 0)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < inf
            ):
                raise FormatError(f"{path}:{number}: {name} = {value!r}; expected 0 or more")
        yield line


def add_up(lines: Iterable[dict[str, Any]]) -> PagingCounters:
    """The counters at a run's end. They start again with each resume, which is where they fall."""
    total, last = PagingCounters(), PagingCounters()
    names = ("prefetched_in_bytes", "prefetched_out_bytes", "waited_seconds")
    for line in lines:
        now = PagingCounters(**{f.name: line.get(f.name, 0) for f in fields(PagingCounters)})
        resumed = any(getattr(now, name) < getattr(last, name) for name in names)
        for name in names:
            before = 0 if resumed else getattr(last, name)
            setattr(total, name, getattr(total, name) + getattr(now, name) - before)
        total.managed_bytes, last = now.managed_bytes, now
    return total


def parts(report: OptimizerReport) -> Iterator[str | Table]:
    """The report for a terminal: lines and tables, in order."""
    if report.optimizer is not None:
        yield f"optimizer  {report.optimizer}, after step {report.steps or 0}"
    yield f"state      {report.state_file or 'none is saved; a checkpoint would hold it'}"
    if report.state:
        yield _state_table(report)
    yield report.verdict
    if report.paging is not None:
        yield _paging_table(report.paging)


def _state_table(report: OptimizerReport) -> Table:
    made = Table("state", "dtype", "tensors", "values", "bytes", "bytes a parameter")
    count = max(report.parameters, 1)
    for part in report.state:
        cells = [f"{number:,}" for number in (part.tensors, part.values, part.nbytes)]
        made.add_row(part.name, part.dtype, *cells, f"{part.nbytes / count:.3f}")
    total = report.state_bytes
    made.add_row("total", "", "", "", f"{total:,}", f"{total / count:.3f}")
    return made


def _paging_table(paging: PagingCounters) -> Table:
    made = Table("paging", "")
    made.add_row("bytes managed", f"{paging.managed_bytes:,}")
    made.add_row("bytes prefetched in", f"{paging.prefetched_in_bytes:,}")
    made.add_row("bytes prefetched out", f"{paging.prefetched_out_bytes:,}")
    made.add_row("seconds waited", f"{paging.waited_seconds:.3f}")
    return made
