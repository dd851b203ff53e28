"""A run's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorax.console import PlainConsole
from lorax.text import visible
from lorax.training.loop import Listener
from lorax.training.metrics import Line
from lorax.training.packing import packing_of
from lorax.training.plan import Plan


class TrainingProgress(Listener):
    """Shows what a run tells; a context manager."""

    def __init__(self, console: PlainConsole):
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def planned(self, plan: Plan) -> None:
        """Say what is going to be trained, on what, for how long."""
        examples, share = plan.examples, 100 * plan.trainable / plan.parameters
        model = plan.recipe.model
        self._say(f"model    {model.path} ({model.dtype}, {model.quantization or 'not quantized'})")
        what = "weights" if plan.recipe.adapter.method == "full" else "adapter"
        self._say(
            f"{what}  trainable params: {plan.trainable:,} || all params: {plan.parameters:,} || "
            f"trainable%: {share:.4f}"
        )
        self._say(
            f"data     {len(plan.train_rows)} rows to train on, {len(plan.eval_rows)} held out "
            f"(kind: {examples.kind}; {examples.truncated} cut at "
            f"{plan.recipe.data.max_length} tokens, {examples.dropped} dropped)"
        )
        if plan.recipe.data.packing:
            self._say(f"packing  {packing_of(plan.recipe, plan.train_rows)}")
        self._say(f"steps    {plan.total_steps} of {plan.recipe.train.batch_size} rows")
        self._bar.update(self._task, total=plan.total_steps)

    def resumed(self, step: int, checkpoint: Path | None) -> None:
        """Say where the run goes on."""
        where = checkpoint.name if checkpoint is not None else "the start: there is no checkpoint"
        self._say(f"resumed  from {where}")
        self._bar.update(self._task, completed=step)

    def said(self, text: str) -> None:
        """Show a remark of the run as a line above the bar."""
        self._say(text)

    def measured(self, line: Line) -> None:
        """Show a step's or an evaluation's numbers."""
        if "eval_loss" in line:
            loss, perplexity = line["eval_loss"], line["eval_perplexity"]
            self._say(
                f"step {line['step']:>5}  held-out loss {loss:.4f}  perplexity {perplexity:.2f}"
            )
            return
        if "not_finite" in line or isinstance(line["loss"], str):
            self._say(
                f"step {line['step']:>5}  loss {line['loss']}  grad {line['grad_norm']}  left out"
            )
            return
        text = f"loss {line['loss']:.4f}  grad {line['grad_norm']:.2f}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=line["step"], description=text)
        else:
            self._say(
                f"step {line['step']:>5}  {text}  rate {line['learning_rate']:.2e}  "
                f"{line['tokens']} tokens  {line['seconds']:.1f} s"
            )

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


class TensorProgress:
    """Shows how many of a model's tensors are done; a context manager, called after each tensor."""

    def __init__(self, console: PlainConsole):
        self._console = console
        self._tenths = 0
        self._bar = Progress(
            TextColumn("tensors"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> TensorProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        """`done` of `total` tensors are written, `name` was the last."""
        self._bar.update(self._task, completed=done, total=total, description=visible(name))
        if not self._console.is_terminal and 10 * done // total > self._tenths:
            self._tenths = 10 * done // total
            line = f"{done:>5} of {total} tensors  {name}"
            self._console.print(line, soft_wrap=True)
