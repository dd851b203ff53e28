"""The training loop, read top to bottom.

One optimizer step:

    rows of the step (batch_size)  ->  micro-batches (micro_batch_size rows, padded)
    for each:  loss = sum over its trained tokens / trained tokens of the whole step;  backward
    the method's penalty, if it has one:  backward
    clip, set the rate, step;  then what the method does after a step

The division by the whole step's tokens makes the gradient that of one large batch: a mean of means
would weigh a short answer's tokens more.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorax.adapters.inject import count_parameters, embedding_weight
from lorax.data.batches import epoch_order, micro_batches, step_batches
from lorax.data.examples import Example, Examples, load_examples
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary, padding_id
from lorax.errors import EnvironmentProblem, NumericalStop, RecipeError
from lorax.formats.directory import check_free
from lorax.formats.huggingface import load_model, load_tokenizer
from lorax.models import Model
from lorax.training.evaluate import evaluate
from lorax.training.loss import summed_loss
from lorax.training.methods import StepHook, model_dtype, result_path, save_result, set_up
from lorax.training.metrics import Line, MetricsFile, draw_loss
from lorax.training.optimizers import build_optimizer, paging_line, set_rates
from lorax.training.recipe import Recipe
from lorax.training.schedule import rate_factor, total_steps, warmup_steps


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, once model and data are known."""

    recipe: Recipe
    examples: Examples
    train_rows: list[Example]
    eval_rows: list[Example]
    total_steps: int
    trainable: int
    parameters: int
    hook: StepHook


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
    """What a run tells while it goes; override what you want to hear."""

    def planned(self, plan: Plan) -> None:
        """Everything is loaded; training is about to start."""

    def measured(self, line: Line) -> None:
        """A line of metrics.jsonl was written."""


def train(recipe: Recipe | str | Path, listener: Listener | None = None) -> Run:
    """Run a recipe (a `Recipe`, or the path of a TOML file).

    Raises:
        RecipeError, FormatError, DataError, AdapterError: before anything is written.
        NumericalStop: a loss or gradient was not finite; metrics.jsonl ends with that step.
        EnvironmentProblem: the disk is full or refuses. A picture that cannot be drawn is one
            warning in the log.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    listener = listener or Listener()
    output = _free_output_dir(recipe)
    torch.manual_seed(recipe.train.seed)
    model, tokenizer, plan = prepare(recipe)
    listener.planned(plan)
    metrics = _start_run(output, recipe)
    measured = _Measured(model, tokenizer, plan, metrics, listener)
    saved = "not saved"
    try:
        _train_steps(model, tokenizer, plan, measured)
        # First of all what took hours; the last evaluation and the picture cannot cost it then.
        plan.hook.finish()
        save_result(model, tokenizer, recipe)
        saved = "saved"
        measured.evaluate(plan.total_steps)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"metrics so far are in {output}, the {result_path(recipe).name} was {saved}"
        ) from None
    finally:
        metrics.close()
        draw_loss(metrics.lines, output / "loss.png", warn=saved == "saved")
    model.eval()
    return Run(output, metrics.lines, model, tokenizer, result_path(recipe))


def prepare(recipe: Recipe) -> tuple[Model, Tokenizer, Plan]:
    """Load data and model, make trainable what the method trains, and count."""
    settings = recipe.model
    tokenizer = load_tokenizer(settings.path, revision=settings.revision)
    examples, train_rows, eval_rows = _load_rows(recipe, tokenizer)
    model = load_model(
        settings.path,
        model_dtype(recipe),
        settings.device,
        settings.quantization,
        revision=settings.revision,
    )
    steps = total_steps(recipe, len(train_rows))
    hook = set_up(model, tokenizer, recipe, steps)
    _check_fit(model, [*train_rows, *eval_rows])
    for row in (*train_rows, *eval_rows):
        check_vocabulary(row.ids, embedding_weight(model).shape[0], tokenizer)
    model.gradient_checkpointing = settings.gradient_checkpointing
    counts = count_parameters(model)
    plan = Plan(recipe, examples, train_rows, eval_rows, steps, *counts, hook)
    return model, tokenizer, plan


@dataclass(frozen=True)
class _Measured:
    """Where a run's numbers go: into metrics.jsonl, then to the listener."""

    model: Model
    tokenizer: Tokenizer
    plan: Plan
    metrics: MetricsFile
    listener: Listener

    def write(self, line: Line) -> None:
        """Put a line down."""
        self.metrics.write(line)
        self.listener.measured(line)

    def evaluate(self, step: int) -> None:
        """Measure the held-out rows, if there are some."""
        if self.plan.eval_rows:
            size, pad_id = self.plan.recipe.train.micro_batch_size, self.tokenizer.pad_token_id
            self.write({"step": step, **evaluate(self.model, self.plan.eval_rows, size, pad_id)})


def _train_steps(model: Model, tokenizer: Tokenizer, plan: Plan, measured: _Measured) -> None:
    settings = plan.recipe.train
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, settings)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    warmup = warmup_steps(plan.total_steps, settings.warmup_ratio)
    pad_id = padding_id(tokenizer.pad_token_id, embedding_weight(model).shape[0])
    tokens = 0
    started = time.perf_counter()
    measured.evaluate(0)
    model.train()
    batches = step_batches(
        plan.train_rows, settings.batch_size, settings.seed, plan.recipe.data.shuffle
    )
    for step, (epoch, rows) in enumerate(islice(batches, plan.total_steps), 1):
        factor = rate_factor(settings.lr_scheduler, step - 1, plan.total_steps, warmup)
        step_tokens = sum(row.tokens for row in rows)
        loss = torch.zeros((), device=device)
        for batch in micro_batches(rows, settings.micro_batch_size, pad_id):
            batch = batch.to(device)
            part = summed_loss(model, batch.input_ids, batch.labels) / step_tokens
            part.backward()
            loss += part.detach()
        penalty = plan.hook.penalty()
        if penalty is not None:
            penalty.backward()
        grad_norm = _clip(trained, settings.max_grad_norm)
        tokens += step_tokens
        line = {
            "step": step,
            "epoch": round(epoch, 6),
            "loss": loss.item(),
            "learning_rate": settings.learning_rate * factor,
            "grad_norm": grad_norm.item(),
            "tokens": tokens,
            "seconds": round(time.perf_counter() - started, 3),
        }
        _stop_unless_finite(line, measured.metrics)
        set_rates(optimizer, base_rates, factor)
        optimizer.step()
        line |= plan.hook.after_step()
        optimizer.zero_grad()
        measured.write(line | paging_line(optimizer))
        due = settings.eval_steps is not None and step % settings.eval_steps == 0
        if due and step < plan.total_steps:  # the last one comes after saving
            measured.evaluate(step)


def _clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip to `max_norm` (0: do not) and give the norm before it."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)


def _stop_unless_finite(line: Line, metrics: MetricsFile) -> None:
    if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
        return
    metrics.write({key: v if math.isfinite(v) else str(v) for key, v in line.items()})
    raise NumericalStop(
        f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; the step "
        "was not taken. A lower train.learning_rate or model.dtype = 'float32' may help"
    )


def _load_rows(
    recipe: Recipe, tokenizer: Tokenizer
) -> tuple[Examples, list[Example], list[Example]]:
    """The file's examples; rows to train on; rows to evaluate on (none by default)."""
    data = recipe.data
    examples = load_examples(Path(data.path), tokenizer, data.max_length, data.columns)
    if data.eval_path:
        held_out = load_examples(Path(data.eval_path), tokenizer, data.max_length, data.columns)
        return examples, examples.rows, held_out.rows
    if not data.eval_fraction:
        return examples, examples.rows, []
    count = max(1, round(len(examples) * data.eval_fraction))
    if count >= len(examples):
        raise RecipeError(f"data.eval_fraction leaves none of {len(examples)} rows to train on")
    # Drawn with an epoch number that no epoch has, so that it is no row order of the training.
    order = epoch_order(len(examples), recipe.train.seed, 2**30, shuffle=True)
    train = [examples.rows[i] for i in sorted(order[count:])]
    return examples, train, [examples.rows[i] for i in sorted(order[:count])]


def _check_fit(model: Model, rows: list[Example]) -> None:
    longest = max(len(row.ids) for row in rows)
    if longest > model.max_positions:
        raise RecipeError(
            f"data.max_length: a row has {longest} tokens, but the model's positions end at "
            f"{model.max_positions}; set it to that or less"
        )
    if next(model.parameters()).dtype == torch.float16:
        raise RecipeError(
            "model.dtype: the checkpoint is float16, in which training overflows; "
            "set 'bfloat16' or 'float32'"
        )


def _free_output_dir(recipe: Recipe) -> Path:
    output = Path(recipe.train.output_dir)
    check_free(output)
    return output


def _start_run(output: Path, recipe: Recipe) -> MetricsFile:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.toml").write_text(recipe.to_toml())
        (output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        return MetricsFile(output / "metrics.jsonl")
    except OSError as error:
        raise EnvironmentProblem(f"{output}: cannot be written ({error.strerror})") from None


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they bear on the result."""
    names = ("lorax-finetuning", "torch", "numpy", "safetensors", "tokenizers")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "packages": {name: importlib.metadata.version(name) for name in names},
    }
