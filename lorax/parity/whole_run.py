"""`lorax verify --run RUN`: a run's first steps, replayed in PEFT and transformers.

    RUN/config.toml ---- lorax's own training loop ------- gradients, parameters --+
          |                                                                        +--> RunReport
          +------------- PeftModel, torch.optim.AdamW ---- gradients, parameters --+
    RUN/metrics.jsonl -- what the run wrote down then ---- loss, norm, rate -------+

Each step is held by itself. Both begin it with the same parameters, rows and random numbers for
dropout, and what they give for the gradients may differ by rounding alone. Then torch's optimizer
takes lorax's gradients, and has to arrive at lorax's parameters; there the next step begins. So
roundings do not pile up over the steps, and the first step that does not hold is where the fault
lies, not where it shows.

Both compute in float32 on the CPU, as in `lorax verify ADAPTER`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorax.data.examples import Example
from lorax.errors import AdapterError, FormatError, UsageError
from lorax.files import require
from lorax.formats.huggingface import as_dtype, load_tokenizer, open_model_files
from lorax.formats.json_files import read_json
from lorax.formats.peft import save_adapter
from lorax.formats.run_record import RECORD
from lorax.parity.bases import files_for_transformers, float32_base
from lorax.parity.difference import (
    COMPUTED,
    COMPUTED_BOUND,
    EXACT,
    GRADIENT,
    SAME,
    Difference,
    difference,
    gradient_bound,
)
from lorax.parity.load_peft import load_peft, peft_versions, require_packages
from lorax.parity.peft_step import PeftSteps, rows_of_steps
from lorax.parity.run_report import ORDER, RunReport, StepCheck
from lorax.parity.sides import LoraxSide
from lorax.quant import codebooks
from lorax.training.callbacks import Callbacks
from lorax.training.fast.install import accelerated
from lorax.training.loop import Listener, Training
from lorax.training.methods import set_up
from lorax.training.metrics import Line, read_metrics
from lorax.training.plan import Plan, load_rows
from lorax.training.processes import Processes
from lorax.training.recipe import Recipe
from lorax.training.run_directory import RunDirectory
from lorax.training.schedule import total_steps, warmup_steps

OPTIMIZER = "torch's AdamW over the same gradients: four roundings of a parameter"
OPTIMIZER_BOUND = 4 * torch.finfo(torch.float32).eps
RATE = "the schedule's factor in float64"
RECORDED = "the run's own numbers; other machines' roundings pile up step by step"
LOW_PRECISION = "the run computed in another dtype than float32"
LOW_PRECISION_BOUND = 5e-2
CLIPPING = (
    "every gradient is {ratio:.6g} times what torch's clipping leaves of it; look at "
    "train.max_grad_norm"
)


def verify_run(
    run: str | os.PathLike[str], steps: int = 10, say: Callable[[str], None] = lambda line: None
) -> RunReport:
    """Replay the first optimizer steps of a run in PEFT.

    Args:
        run: its directory: config.toml and metrics.jsonl, the model and rows that they name.
        steps: how many, of those that the run took.
        say: is told what is being done.

    Raises:
        UsageError: steps is below 1, or the run does what PEFT cannot be asked to do.
        AdapterError: a variant that PEFT does not train as lorax does.
        FormatError: no run is there. EnvironmentProblem: peft or transformers is missing.
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}; expected at least 1")
    path = require(run)
    if not (path / RECORD).is_file():
        raise FormatError(f"{path}: no {RECORD}; expected the directory of a run")
    recipe = Recipe.load(path / RECORD, run_plugins=False)
    _refuse(recipe, path)
    require_packages("peft", "transformers", *["bitsandbytes"] * bool(recipe.model.quantization))
    _refuse_shared_dropout(recipe, path)
    recorded = [x for x in read_metrics(path / "metrics.jsonl") if isinstance(x.get("loss"), float)]
    wanted = ("grad_norm", "learning_rate", "tokens")
    if any(not isinstance(x.get(key), int | float) for x in recorded for key in wanted):
        raise FormatError(f"{path}/metrics.jsonl: a step lacks one of {wanted}; get it anew")
    if not recorded:
        raise FormatError(f"{path}/metrics.jsonl: no step is in it; expected a run that took one")
    with tempfile.TemporaryDirectory(prefix="lorax-verify-") as folder:
        return _Replay(recipe, path, recorded[:steps], Path(folder), say).report()


def _refuse_shared_dropout(recipe: Recipe, path: Path) -> None:
    """Each process drew dropout's numbers for itself, which one process cannot draw again."""
    environment = path / "environment.json"
    shared = read_json(environment).get("processes", 1) if environment.is_file() else 1
    if shared != 1 and getattr(recipe.adapter, "lora_dropout", 0):
        raise UsageError(
            f"{environment}: the run was shared by {shared} processes, and drew dropout's numbers "
            "in each; verify --run replays one process: give the run's adapter instead"
        )


def _refuse(recipe: Recipe, path: Path) -> None:
    """What PEFT cannot be asked to do, by its key."""
    said = {
        f"adapter.method = {recipe.adapter.method!r}": recipe.adapter.method != "lora",
        f"train.optimizer = {recipe.train.optimizer!r}": "8bit" in recipe.train.optimizer,
        "train.hooks": bool(recipe.train.hooks),
        "plugins": bool(recipe.plugins),
        "data.packing": recipe.data.packing,
        "data.group_by_length": recipe.data.group_by_length,
        f"model.quantization = {recipe.model.quantization!r}": recipe.model.quantization
        not in (None, *codebooks.formats(bitsandbytes=True)),
    }
    found = next((key for key, is_there in said.items() if is_there), None)
    if found is not None:
        raise UsageError(
            f"{path / RECORD}: {found}: verify --run replays LoRA and its choices (rsLoRA, DoRA, "
            "LoRA+) with AdamW over plain and 4-bit bases; give the run's adapter instead"
        )


class _Witnessed(Training):
    """lorax's training, with a judge who sees each step."""

    judge: _Judge

    def _backward(self, rows: list[Example]) -> Tensor:
        loss = super()._backward(rows)
        self.judge.gradients()
        return loss

    def _step(self, epoch: float, rows: list[Example]) -> None:
        self.judge.begin(rows, torch.get_rng_state())
        super()._step(epoch, rows)
        self.judge.end(self.metrics.lines[-1])


class _Replay:
    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        recorded: Sequence[Line],
        folder: Path,
        say: Callable[[str], None],
    ):
        self.path, self.recorded, self.folder, self.say = path, recorded, folder, say
        train = recipe.train.model_copy(
            update={"output_dir": str(folder / "run"), "save_steps": 0, "digests": False,
                    "loggers": [], "eval_steps": None, "early_stopping_patience": 0}
        )  # fmt: skip
        model = recipe.model.model_copy(update={"device": "cpu", "gradient_checkpointing": False})
        self.recipe = recipe.model_copy(update={"train": train, "model": model})
        self.dtype = as_dtype(model.dtype) or open_model_files(model.path).dtype

    def report(self) -> RunReport:
        """Both sides, step by step."""
        settings = self.recipe.model
        self.say(f"lorax loads {settings.path}")
        torch.manual_seed(self.recipe.train.seed)
        tokenizer = load_tokenizer(settings.path, revision=settings.revision)
        examples, rows, _ = load_rows(self.recipe, tokenizer)
        model = float32_base(settings.path, self.dtype, settings.quantization)
        base, note = files_for_transformers(
            settings.path, model, settings.quantization, self.folder
        )
        total = total_steps(self.recipe, len(rows))
        hook = set_up(model, tokenizer, self.recipe, total)
        generator = torch.get_rng_state()  # PEFT draws numbers of its own before training does
        save_adapter(model, self.folder / "start")
        self.say("PEFT loads the same start")
        theirs, said = self._load_peft(base)
        warmup = warmup_steps(total, self.recipe.train.warmup_ratio)
        judge = _Judge(
            LoraxSide(model), PeftSteps(theirs, self.recipe.train, total, warmup), self.recipe, rows
        )
        judge.start(str(self.path))
        plan = Plan(self.recipe, examples, rows, [], total, 0, 0, hook)
        run = RunDirectory(self.recipe)
        run.path.mkdir()
        last = len(self.recorded)

        def enough(line: Line, _: Any) -> bool:
            return bool(line["step"] >= last)

        called = Callbacks([enough])
        training = _Witnessed(model, tokenizer, plan, run, Listener(), False, called, Processes())
        training.judge = judge
        training.optimizer.register_step_pre_hook(lambda *_: judge.clipped())
        training.optimizer.register_step_post_hook(lambda *_: judge.parameters())
        self.say(f"{last} steps in both")
        torch.set_rng_state(generator)
        try:
            with accelerated(model, self.recipe.train.fast):
                training.run_steps()
        finally:
            training.metrics.close()
        judge.hold_record(self.recorded, training.metrics.lines, self.dtype)
        notes = [*([note] if note else []), *said]
        if self.dtype != torch.float32:
            notes.append("the run computed in low precision; it is replayed in float32")
        return RunReport(
            adapter=str(self.path),
            base=settings.path,
            against=peft_versions(),
            quantization=settings.quantization,
            tokens=training.live.progress.tokens,
            checks=judge.in_order(),
            notes=notes,
            steps=last,
        )

    def _load_peft(self, base: Path) -> Any:
        try:
            return load_peft(self.folder / "start", base, self.dtype)
        except Exception as error:  # PEFT raises whatever it meets
            reason = " ".join(str(error).split())[:300]
            raise AdapterError(
                f"{self.path}: PEFT does not load the run's start ({type(error).__name__}: "
                f"{reason}); expected a variant that PEFT trains: give the run's adapter instead"
            ) from None


class _Judge:
    """Holds each of lorax's steps against PEFT's."""

    def __init__(self, mine: LoraxSide, theirs: PeftSteps, recipe: Recipe, rows: Sequence[Example]):
        self.mine, self.theirs = mine, theirs
        train = recipe.train
        self._rows = rows_of_steps(rows, train.batch_size, train.seed, recipe.data.shuffle)
        self._checks: list[StepCheck] = []
        self._step = 0
        self._loss = self._norm = self._rate = 0.0

    def start(self, run: str) -> None:
        """Both hold the same tensors, to the bit.

        Raises:
            AdapterError: they do not hold the same tensors at all.
        """
        mine, theirs = self._tensors(), self.theirs.parameters
        odd = sorted(set(mine) ^ set(theirs)) or [
            name for name, p in theirs.items() if p.shape != mine[name].shape
        ]
        if odd:
            raise AdapterError(
                f"{run}: {odd[0]} is not trained alike by lorax and PEFT; expected a variant "
                "that both train: give the run's adapter instead"
            )
        for name, parameter in theirs.items():
            self._tensor("adapter tensor", name, difference(mine[name], parameter), 0.0, EXACT)

    def begin(self, rows: list[Example], generator: Tensor) -> None:
        """Before lorax's step: PEFT computes its gradients over the rows that are due."""
        self._step += 1
        due = next(self._rows)
        same = [r.ids for r in rows] == [r.ids for r in due]
        note = "" if same else "other rows, or another order, than seed and epoch ask for"
        apart = Difference(False, 1.0, 1.0, 1.0, None)
        self._whole("rows", SAME if same else apart, 0.0, EXACT, note)
        self._loss, self._found = self.theirs.gradients(due, generator)

    def gradients(self) -> None:
        """Behind lorax's last backward: its gradients against PEFT's, which torch then clips."""
        mine = self._gradients()
        largest = max((g.norm().item() for g in self._found.values()), default=0.0)
        for name, other in self._found.items():
            one = mine.get(name, torch.full_like(other, torch.nan))
            bound = gradient_bound(other, largest)
            self._tensor("gradient", name, difference(one, other), bound, GRADIENT)
        self._norm, self._clipped = self.theirs.clip(mine)

    def clipped(self) -> None:
        """lorax's optimizer is about to move; torch's does so over the same gradients."""
        mine = self._gradients()
        note = _one_factor(mine, self._clipped)
        for name, other in self._clipped.items():
            gap = difference(mine[name], other)
            said = note if gap.relative > COMPUTED_BOUND else ""
            self._tensor("clipped", name, gap, COMPUTED_BOUND, COMPUTED, said)
        self._rate = self.theirs.step(self._step, mine)

    def parameters(self) -> None:
        """lorax's optimizer has moved."""
        mine = self._tensors()
        for name, other in self.theirs.parameters.items():
            gap = difference(mine[name], other.detach())
            self._tensor("parameter", name, gap, OPTIMIZER_BOUND, OPTIMIZER)
        self.theirs.stand_at(mine)

    def end(self, line: Line) -> None:
        """The step is written down."""
        self._number("loss", line["loss"], self._loss, COMPUTED_BOUND, COMPUTED)
        self._number("norm", line["grad_norm"], self._norm, COMPUTED_BOUND, COMPUTED)
        self._number("rate", line["learning_rate"], self._rate, 1e-12, RATE)

    def hold_record(
        self, recorded: Sequence[Line], replayed: Sequence[Line], dtype: torch.dtype
    ) -> None:
        """What the run wrote down then, against the replay."""
        for then, now in zip(recorded, replayed, strict=True):
            self._step = then["step"]
            bound, source = COMPUTED_BOUND * self._step, RECORDED
            if dtype != torch.float32:
                bound, source = LOW_PRECISION_BOUND, LOW_PRECISION
            for key in ("loss", "grad_norm", "learning_rate", "tokens"):
                exact = key in ("learning_rate", "tokens")
                note = f"{key} is {then[key]} on record, {now[key]} now"
                self._number("record", then[key], now[key], 1e-12 if exact else bound, source, note)

    def in_order(self) -> list[StepCheck]:
        """Step by step, and in each step by cause and effect."""
        return sorted(self._checks, key=lambda c: (c.step, ORDER.index(c.quantity)))

    def _gradients(self) -> dict[str, Tensor]:
        return {name: g.detach().clone() for name, g in self.mine.gradients().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in self.mine.tensors().items() if t.numel()}

    def _tensor(
        self, quantity: str, name: str, gap: Difference, bound: float, source: str, note: str = ""
    ) -> None:
        homes = (p for p in self.mine.modules if name.startswith(p + "."))
        path = max(homes, key=len, default="")
        part = name.removeprefix(path + ".")
        self._checks.append(
            StepCheck(path, quantity, part, gap, bound, source, note, step=self._step)
        )

    def _number(
        self, quantity: str, mine: float, theirs: float, bound: float, source: str, note: str = ""
    ) -> None:
        pair = (torch.tensor(float(value), dtype=torch.float64) for value in (mine, theirs))
        gap = difference(*pair)
        failed = gap.relative > bound
        note = (note or f"{mine:.9g} in lorax, {theirs:.9g} in PEFT") if failed else ""
        self._whole(quantity, gap, bound, source, note)

    def _whole(
        self, quantity: str, gap: Difference, bound: float, source: str, note: str = ""
    ) -> None:
        self._checks.append(StepCheck("", quantity, "", gap, bound, source, note, step=self._step))


def _one_factor(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """What to say where all gradients are off by one and the same factor."""
    sizes = [(mine[n].norm().item(), g.norm().item()) for n, g in theirs.items() if n in mine]
    ratios = [one / other for one, other in sizes if other]
    if not ratios or max(ratios) - min(ratios) > 1e-4 * max(ratios):
        return ""
    return CLIPPING.format(ratio=ratios[0])
