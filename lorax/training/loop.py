"""The training loop, read top to bottom.

One optimizer step:

    rows of the step (batch_size)  ->  micro-batches (micro_batch_size rows, padded; or packed)
    for each:  loss = sum over its trained tokens / trained tokens of the whole step;  backward
    the method's penalty, if it has one:  backward
    clip, set the rate, step;  then what the method does after a step

The division by the whole step's tokens makes the gradient that of one large batch: a mean of means
would weigh a short answer's tokens more.

Behind a step: an evaluation and a checkpoint, where they are due. A run that ended early, by a
signal or by force, goes on from the newest checkpoint with the same bits (snapshot.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from lorax.adapters.tables import embedding_weight
from lorax.data.batches import micro_batches, step_batches
from lorax.data.examples import Example
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import padding_id
from lorax.errors import NumericalStop
from lorax.models import Model
from lorax.optim.clip import clip
from lorax.training.callbacks import Callback, Callbacks
from lorax.training.checkpoint import clear_litter, newest_checkpoint, rotate, write_checkpoint
from lorax.training.digests import StepDigests
from lorax.training.evaluate import evaluate
from lorax.training.fast.install import accelerated
from lorax.training.finished import load_finished
from lorax.training.hooks import HookFactory, StepHook
from lorax.training.loggers import Loggers, check_installed
from lorax.training.methods import save_result
from lorax.training.metrics import Line, MetricsFile, draw_loss
from lorax.training.optimizers import build_optimizer, paging_line, set_rates
from lorax.training.plan import Plan, prepare
from lorax.training.processes import Processes, processes
from lorax.training.recipe import Recipe
from lorax.training.run_directory import RunDirectory
from lorax.training.schedule import rate_factor, warmup_steps
from lorax.training.signals import Interrupted, Signals
from lorax.training.snapshot import (
    Live,
    Progress,
    copy_tensors,
    digest_of_rows,
    files_of,
    restore,
    trained_tensors,
)

MAX_NOT_FINITE = 10  # steps in a row that are skipped or rolled back; then the run stops


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its metrics, and the trained model, adapter included.

    result: `adapter/` in the run's directory or, after full fine-tuning, `model/`.
    """

    output_dir: Path
    metrics: list[Line]
    model: Model
    tokenizer: Tokenizer
    result: Path


class Listener:
    """What a run tells while it is under way; override the events you need."""

    def planned(self, plan: Plan) -> None:
        """Everything is loaded; training is about to start."""

    def resumed(self, step: int, checkpoint: Path | None) -> None:
        """A run goes on behind `step`, from a checkpoint or (None) from its start."""

    def measured(self, line: Line) -> None:
        """A line of metrics.jsonl was written."""

    def said(self, text: str) -> None:
        """Something happened that a person should know: a checkpoint, an early stop."""


def train(
    recipe: Recipe | str | Path,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    hooks: Sequence[HookFactory | StepHook] = (),
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Run a recipe (a `Recipe`, or the path of a TOML file).

    Args:
        listener: hears what happens.
        resume: go on from the newest complete checkpoint in train.output_dir, bit for bit as if
            the run had never stopped; from the start if there is none. A finished run stays as it
            is, and is loaded.
        hooks: what is added to each optimizer step, beside the recipe's train.hooks: StepHooks, or
            functions (or classes) that make one of the model.
        callbacks: plain functions of (line, model), called behind each line of metrics.jsonl. One
            that returns True ends the run behind this step, as if it had been the last; see
            callbacks.py.

    Raises:
        RecipeError, FormatError, DataError, AdapterError: before anything is written.
        NumericalStop: a loss or gradient was not finite; metrics.jsonl ends with that step.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved first.
        PluginError: a callback failed; a checkpoint was saved first, or the run was finished.
        EnvironmentProblem: the disk refuses, another run is at work in the directory, or one of
            train.loggers is not installed.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    called = Callbacks(callbacks)
    check_installed(recipe.train.loggers)
    with processes(recipe.model.device) as group:
        return _train(recipe, listener or Listener(), resume, hooks, called, group)


def _train(
    recipe: Recipe,
    listener: Listener,
    resume: bool,
    hooks: Sequence[HookFactory | StepHook],
    callbacks: Callbacks,
    group: Processes,
) -> Run:
    run = RunDirectory(recipe)
    if group.writes:
        run.check(recipe, resume)
    else:
        listener = Listener()
    if group.from_writer(resume and run.is_finished):
        return _load_finished(recipe, run, listener, group)
    torch.manual_seed(recipe.train.seed)
    model, tokenizer, plan = prepare(recipe, hooks)
    listener.planned(plan)
    if group.writes:
        run.begin(recipe, resume, group.size)
    try:
        training = Training(model, tokenizer, plan, run, listener, resume, callbacks, group)
        with accelerated(model, recipe.train.fast):
            training.run_and_save(tokenizer)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        kept = "is saved" if run.is_finished else "is not saved"
        raise KeyboardInterrupt(
            f"metrics so far are in {run.path}, the {run.result.name} {kept}; go on with: "
            f"lorax train {run.config} --resume"
        ) from None
    finally:
        run.release()
    model.eval()
    return Run(run.path, training.metrics.lines, model, tokenizer, run.result)


class Training:
    """A run under way: what changes with each step, and the steps."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        plan: Plan,
        run: RunDirectory,
        listener: Listener,
        resume: bool,
        callbacks: Callbacks,
        group: Processes,
    ):
        self.group = group
        self.model, self.plan, self.run, self.listener = model, plan, run, listener
        self.callbacks = callbacks
        self.settings = plan.recipe.train
        self.pad_id = padding_id(tokenizer.pad_token_id, embedding_weight(model).shape[0])
        self.device = next(model.parameters()).device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, self.settings)
        self.base_rates = [entry["lr"] for entry in self.optimizer.param_groups]
        self.warmup = warmup_steps(plan.total_steps, self.settings.warmup_ratio)
        self.rows_digest = digest_of_rows(plan.train_rows, plan.eval_rows)
        self.live = Live(model, self.optimizer, plan.hook, Progress(), {})
        if group.writes:
            clear_litter(run.checkpoints)
        checkpoint = self._newest_checkpoint() if resume else None
        if checkpoint is not None:
            restore(checkpoint, self.live, self.rows_digest)
        self.gradients = group.gradients(model, self.settings.parallel)
        if group.writes:
            self.metrics = MetricsFile(run.metrics, self.live.progress.metrics_bytes)
        else:
            self.metrics = MetricsFile(Path(os.devnull))
        loggers = self.settings.loggers if group.writes else []
        self.loggers = Loggers(loggers, run.path, self.metrics.lines, resume)
        self.digests = None
        if self.settings.digests and group.writes:
            self.digests = StepDigests(run.digests, model, self.live.progress.step)
        if resume:
            listener.resumed(self.live.progress.step, checkpoint)
        self.started = time.perf_counter() - self.live.progress.seconds

    def run_steps(self) -> None:
        """Every step that is left; a checkpoint first where a signal ends the run.

        Raises:
            NumericalStop, Interrupted, EnvironmentProblem: as `train`.
        """
        progress, data = self.live.progress, self.plan.recipe.data
        if progress.step == 0:
            self._start()
        self.model.train()
        order = self.settings.seed, data.shuffle, data.group_by_length
        batches = step_batches(self.plan.train_rows, self.settings.batch_size, *order)
        with Signals(at_once=self.group.size == 1) as signals:
            for epoch, rows in islice(batches, progress.step, self.plan.total_steps):
                self._step(epoch, rows)
                self._evaluate_if_due()
                if self._has_stopped_early() or self._is_told_to_stop():
                    break
                self._save_if_due(signals)
                self._raise_what_failed()

    def run_and_save(self, tokenizer: Tokenizer) -> None:
        """The steps; then first of all what took hours is saved, and all else comes after it."""
        saved = False
        try:
            self.run_steps()
            if self.live.best:  # early stopping: those of the lowest held-out loss
                copy_tensors(self.live.best, self.model, "the best so far")
            self.plan.hook.finish()
            if self.group.writes:
                save_result(self.model, tokenizer, self.run.result)
            saved = True
            evaluated = "eval_loss" in self.metrics.lines[-1]  # where a callback ended it there
            if self.plan.eval_rows and not self.settings.early_stopping_patience and not evaluated:
                self._evaluate()
            if self.callbacks.failure is not None:  # in the last step, or in this evaluation
                raise self.callbacks.failure
        finally:
            self.metrics.close()
            self.loggers.close()
            if self.digests is not None:
                self.digests.close()
            if self.group.writes:
                draw_loss(self.metrics.lines, self.run.picture, warn=saved)

    def _start(self) -> None:
        """Before the first step: an evaluation, and where to roll back to."""
        if self.plan.eval_rows:
            self._evaluate()
        if self.settings.nan_policy == "rollback":
            self._save()

    def _step(self, epoch: float, rows: list[Example]) -> None:
        """One optimizer step over these rows."""
        progress = self.live.progress
        progress.step += 1
        self.group.seed(self.settings.seed, progress.step)
        factor = rate_factor(
            self.settings.lr_scheduler, progress.step - 1, self.plan.total_steps, self.warmup
        )
        if self.digests is not None:
            self.digests.begin(progress.step, rows)
        loss = self._backward(rows)
        if (penalty := self.plan.hook.penalty()) is not None:
            penalty.backward()
        if self.digests is not None:
            self.digests.gradients()
        norm = clip(self.optimizer, self.trained, self.settings.max_grad_norm, _clip)
        loss_value, grad_norm = torch.stack([loss, norm.to(loss)]).tolist()
        progress.tokens += sum(row.tokens for row in rows)
        line = {
            "step": progress.step,
            "epoch": round(epoch, 6),
            "loss": loss_value,
            "learning_rate": self.settings.learning_rate * factor,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
            progress.not_finite = 0
            set_rates(self.optimizer, self.base_rates, factor)
            self.optimizer.step()
            line |= self.plan.hook.after_step()
            self.optimizer.zero_grad()
            self._measure(line | paging_line(self.optimizer))
        else:
            self.optimizer.zero_grad()
            self._not_finite(line)
        if self.digests is not None:
            self.digests.finish()

    def _backward(self, rows: list[Example]) -> Tensor:
        """Gradients of the rows' mean loss over their trained tokens; that loss, () float32."""
        tokens = sum(row.tokens for row in rows)
        loss = torch.zeros((), device=self.device)
        size = self.group.micro_batch_size(len(rows), self.settings.micro_batch_size)
        cut = micro_batches(rows, size, self.pad_id, self.plan.recipe.room)
        batches = self.group.share(cut)
        for left, batch in zip(range(len(batches))[::-1], batches, strict=True):
            loss += self.gradients.add(batch.to(self.device), tokens, is_last=left == 0)
        return self.group.total(loss)

    def _not_finite(self, line: Line) -> None:
        """A loss or gradient that is no number: stop, leave the step out, or go back as well."""
        policy, progress = self.settings.nan_policy, self.live.progress
        progress.not_finite += 1
        stated = {k: v if math.isfinite(v) else str(v) for k, v in line.items()}
        self._measure(stated if policy == "stop" else stated | {"not_finite": policy})
        if policy == "stop" or progress.not_finite >= MAX_NOT_FINITE:
            raise NumericalStop(
                f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; "
                "expected finite numbers, so the step was not taken; try a lower "
                "train.learning_rate, or model.dtype = 'float32'"
            )
        if policy == "skip":
            self.plan.hook.skip_step()
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        """The newest checkpoint's parameters and optimizer; the data goes on."""
        now, generators = self.live.progress, torch.get_rng_state()
        checkpoint = self._newest_checkpoint()
        assert checkpoint is not None, "one is saved before the first step"
        restore(checkpoint, self.live, self.rows_digest)
        torch.set_rng_state(generators)
        self.live.progress = now

    def _evaluate_if_due(self) -> None:
        step, every = self.live.progress.step, self.settings.eval_steps
        due = every is not None and step % every == 0
        is_last = step == self.plan.total_steps
        if is_last:  # it comes behind saving, unless early stopping has to look first
            due = self.settings.early_stopping_patience > 0
        if self.plan.eval_rows and due:
            self._evaluate()

    def _evaluate(self) -> None:
        """Held-out loss; where early stopping watches, the parameters of the lowest are kept."""
        progress = self.live.progress
        size, room = self.settings.micro_batch_size, self.plan.recipe.room
        found = evaluate(self.model, self.plan.eval_rows, size, self.pad_id, room, self.group)
        self._measure({"step": progress.step, **found})
        if not self.settings.early_stopping_patience or progress.step == 0:
            return
        if progress.best_loss is None or found["eval_loss"] < progress.best_loss:
            progress.best_loss, progress.since_best = found["eval_loss"], 0
            self.live.best = {n: t.clone() for n, t in trained_tensors(self.model).items()}
        else:
            progress.since_best += 1

    def _has_stopped_early(self) -> bool:
        patience, progress = self.settings.early_stopping_patience, self.live.progress
        if not patience or progress.since_best < patience:
            return False
        self.listener.said(
            f"stopped early at step {progress.step}: {progress.since_best} evaluations without a "
            f"lower held-out loss; the parameters of the lowest, {progress.best_loss:.4f}, are kept"
        )
        return True

    def _is_told_to_stop(self) -> bool:
        (asked,) = self.group.largest(int(self.callbacks.stop))
        if asked and self.callbacks.failure is None:
            step = self.live.progress.step
            self.listener.said(f"stopped at step {step}: a callback asked for it")
            return True
        return False

    def _raise_what_failed(self) -> None:
        """A callback's failure, once its step is saved; behind the last step the run is first."""
        step, failure = self.live.progress.step, self.callbacks.failure
        if failure is None or step >= self.plan.total_steps:
            return
        self._save()
        raise type(failure)(
            f"{failure}; step {step} is saved in {self.run.checkpoints}; go on with resume=True"
        ) from failure.__cause__

    def _save_if_due(self, signals: Signals) -> None:
        step, every = self.live.progress.step, self.settings.save_steps
        due = every > 0 and step % every == 0 and step < self.plan.total_steps
        stop, save = self.group.largest(signals.stop or 0, int(signals.save))
        if due or save or stop:
            signals.save = False
            self._save()
        if stop:
            raise Interrupted(
                f"step {step} of {self.plan.total_steps} is saved in {self.run.checkpoints}; "
                f"go on with: lorax train {self.run.config} --resume",
                stop,
            )

    def _newest_checkpoint(self) -> Path | None:
        """The newest complete one, which process 0 looks for."""
        found = newest_checkpoint(self.run.checkpoints) if self.group.writes else None
        return self.group.from_writer(found)

    def _save(self) -> None:
        if not self.group.writes:
            return
        progress = self.live.progress
        progress.seconds = time.perf_counter() - self.started
        progress.metrics_bytes = self.metrics.sync()
        files = files_of(self.live, self.rows_digest)
        write_checkpoint(self.run.checkpoints, progress.step, files)
        rotate(self.run.checkpoints, self.settings.keep_checkpoints)

    def _measure(self, line: Line) -> None:
        self.metrics.write(line)
        self.loggers.write(line)
        self.listener.measured(line)
        self.callbacks.call(line, self.model)


def _clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clip to `max_norm` (0: do not) and give the norm before it."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def _load_finished(recipe: Recipe, run: RunDirectory, listener: Listener, group: Processes) -> Run:
    """A run that is done, as it was left; of several processes the first one looks first."""
    if not group.writes:
        group.from_writer(None)
    model, tokenizer, lines = load_finished(recipe, run, listener.said)
    if group.writes:
        group.from_writer(None)
    return Run(run.path, lines, model, tokenizer, run.result)
