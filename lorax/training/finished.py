"""A run that is done: loaded as it was left.

What was trained is saved before the last evaluation. A process that died between the two leaves a
finished run whose metrics.jsonl lacks one line; that line is made up for here, from the same
parameters and the same rows.
"""

from __future__ import annotations

from collections.abc import Callable

from lorax.adapters.full import train_everything
from lorax.adapters.tables import embedding_weight
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import padding_id
from lorax.formats.huggingface import load_model, load_tokenizer
from lorax.formats.peft import load_adapter
from lorax.models import Model
from lorax.training.evaluate import evaluate
from lorax.training.fast.install import accelerated
from lorax.training.loggers import Loggers
from lorax.training.methods import load_base, model_dtype
from lorax.training.metrics import Line, MetricsFile, draw_loss, parse_lines, read_metrics
from lorax.training.plan import load_rows
from lorax.training.recipe import Recipe
from lorax.training.run_directory import RunDirectory


def load_finished(
    recipe: Recipe, run: RunDirectory, say: Callable[[str], None]
) -> tuple[Model, Tokenizer, list[Line]]:
    """The model with what was trained, its tokenizer, and the lines of metrics.jsonl.

    Raises:
        FormatError: metrics.jsonl is damaged. EnvironmentProblem: another run is at work there.
    """
    settings = recipe.model
    tokenizer = load_tokenizer(settings.path, revision=settings.revision)
    if recipe.variant.trains_base:
        model = load_model(run.result, model_dtype(recipe), settings.device)
        train_everything(model)  # a trained head's loss is summed another way than a frozen one's
    else:
        model = load_base(recipe)
        load_adapter(model, run.result, trainable=True)
    lines, size = _whole_lines(run)
    has_rows = bool(recipe.data.eval_path or recipe.data.eval_fraction)
    early = recipe.train.early_stopping_patience > 0  # evaluates before saving
    if not has_rows or early or not lines or "eval_loss" in lines[-1]:
        say(f"{run.path} is finished; it stays as it is")
        return model, tokenizer, lines
    say(f"{run.path} is finished but for its last evaluation, which is made up for")
    return model, tokenizer, _evaluate(recipe, run, model, tokenizer, size)


def _whole_lines(run: RunDirectory) -> tuple[list[Line], int]:
    """The lines of metrics.jsonl, and how many bytes they are; half a line at the end is none."""
    try:
        content = run.metrics.read_bytes()
        size = content.rfind(b"\n") + 1
        return parse_lines(content[:size]), size
    except (OSError, ValueError):
        return read_metrics(run.metrics), 0  # says what is wrong


def _evaluate(
    recipe: Recipe, run: RunDirectory, model: Model, tokenizer: Tokenizer, size: int
) -> list[Line]:
    """Write the line, behind the first `size` bytes of metrics.jsonl."""
    rows = load_rows(recipe, tokenizer)[2]
    pad_id = padding_id(tokenizer.pad_token_id, embedding_weight(model).shape[0])
    run.lock()
    metrics = MetricsFile(run.metrics, size)
    try:
        with accelerated(model, recipe.train.fast):  # the run's own bits
            found = evaluate(model, rows, recipe.train.micro_batch_size, pad_id, recipe.room)
        metrics.write({"step": metrics.lines[-1]["step"], **found})
        Loggers(recipe.train.loggers, run.path, metrics.lines, goes_on=True).close()
        draw_loss(metrics.lines, run.picture)
    finally:
        metrics.close()
        run.release()
    return metrics.lines
