"""What a run is going to do: `describe` says it without loading a model, `prepare` sets it up.

Both count with the same functions, so that a dry run says what the run then does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorax.adapters.counting import count_parameters
from lorax.adapters.tables import embedding_weight
from lorax.adapters.variants import UNKNOWN_STEPS
from lorax.data.batches import epoch_order
from lorax.data.examples import Example, Examples, load_examples, read_checked
from lorax.data.kinds import find_kind
from lorax.data.rows import Row
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary
from lorax.errors import RecipeError
from lorax.formats.huggingface import load_tokenizer
from lorax.models import Model
from lorax.training.hooks import HookFactory, StepHook
from lorax.training.methods import load_base, set_up
from lorax.training.packing import packing_of, packs_documents
from lorax.training.recipe import Recipe
from lorax.training.run_directory import RunDirectory
from lorax.training.schedule import total_steps

_NO_EPOCH = 2**30  # held-out rows are drawn with an epoch number that no epoch has


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


def prepare(
    recipe: Recipe, hooks: Sequence[HookFactory | StepHook] = ()
) -> tuple[Model, Tokenizer, Plan]:
    """Load data and model, make trainable what the method trains, and count."""
    settings = recipe.model
    tokenizer = load_tokenizer(settings.path, revision=settings.revision)
    examples, train_rows, eval_rows = load_rows(recipe, tokenizer)
    model = load_base(recipe)
    steps = total_steps(recipe, len(train_rows))
    hook = set_up(model, tokenizer, recipe, steps, hooks)
    _check_fit(model, [*train_rows, *eval_rows])
    if recipe.data.packing and not packs_documents(model):
        raise RecipeError(
            f"data.packing: {model.config.model_type}'s attention does not keep packed documents "
            "apart; set it to false, or let the family call context.attend"
        )
    for row in (*train_rows, *eval_rows):
        check_vocabulary(row.ids, embedding_weight(model).shape[0], tokenizer)
    model.gradient_checkpointing = settings.gradient_checkpointing
    counts = count_parameters(model)
    return model, tokenizer, Plan(recipe, examples, train_rows, eval_rows, steps, *counts, hook)


def held_out(rows: int, recipe: Recipe) -> list[int]:
    """Which of so many rows are kept from training by data.eval_fraction, in their order.

    Raises:
        RecipeError: none would be left to train on.
    """
    if not recipe.data.eval_fraction:
        return []
    count = max(1, round(rows * recipe.data.eval_fraction))
    if count >= rows:
        raise RecipeError(
            f"data.eval_fraction leaves none of {rows} rows to train on; "
            "give a smaller fraction, or more rows"
        )
    return sorted(epoch_order(rows, recipe.train.seed, _NO_EPOCH, shuffle=True)[:count])


def describe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, and what is known of the data without loading a model.

    Raises:
        UsageError: the run's directory is taken. DataError: the rows cannot be read.
    """
    RunDirectory(recipe).check(recipe, resume=False)
    train = recipe.train
    accumulation = -(-train.batch_size // train.micro_batch_size)
    path = Path(recipe.data.path)
    rows = read_checked(path, recipe.data.columns) if path.is_file() else None
    apart = len(held_out(len(rows), recipe)) if rows else 0
    steps = total_steps(recipe, len(rows) - apart) if rows else recipe.train.max_steps
    what = (
        _describe_packing(recipe)
        if recipe.data.packing
        else f"{accumulation} micro-batches of at most {train.micro_batch_size}"
    )
    return (
        f"{recipe.to_toml()}\n{_describe_model(recipe)}"
        f"{_describe_data(path, rows, apart, steps)}"
        f"{_describe_evaluation(recipe)}"
        f"# a step: {train.batch_size} rows in {what}\n"
        f"{_describe_method(recipe, steps)}"
        "# no model was loaded and nothing was written"
    )


def load_rows(
    recipe: Recipe, tokenizer: Tokenizer
) -> tuple[Examples, list[Example], list[Example]]:
    """The file's examples; rows to train on; rows to evaluate on (none by default)."""
    data = recipe.data
    examples = load_examples(Path(data.path), tokenizer, data.max_length, data.columns)
    if data.eval_path:
        other = load_examples(Path(data.eval_path), tokenizer, data.max_length, data.columns)
        return examples, examples.rows, other.rows
    apart = set(held_out(len(examples), recipe))
    train = [row for index, row in enumerate(examples.rows) if index not in apart]
    return examples, train, [examples.rows[index] for index in sorted(apart)]


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


def _describe_data(path: Path, rows: list[Row] | None, apart: int, steps: int | None) -> str:
    if not rows:
        return f"# {path} is not here: rows and steps are not known\n"
    return (
        f"# {path}: {len(rows)} rows, kind: {find_kind(rows[0]).name}, {apart} of them held out\n"
        f"# {steps} optimizer steps, unless rows are dropped for their length\n"
    )


def _describe_packing(recipe: Recipe) -> str:
    """What packing does, counted with the model's tokenizer where that and the rows are here."""
    settings = recipe.model
    passes = f"packed forward passes of at most {recipe.room} tokens"
    here = Path(settings.path).exists() and Path(recipe.data.path).is_file()
    if not here:
        return f"{passes}; how many is known with the tokenizer and the rows"
    tokenizer = load_tokenizer(settings.path, revision=settings.revision)
    _, train_rows, _ = load_rows(recipe, tokenizer)
    return f"{passes}\n# packing: {packing_of(recipe, train_rows)}"


def _describe_evaluation(recipe: Recipe) -> str:
    if not recipe.data.eval_path:
        return ""
    path = Path(recipe.data.eval_path)
    if not path.is_file():
        return f"# {path} is not here: the run would stop there\n"
    return f"# {path}: {len(read_checked(path, recipe.data.columns))} rows to evaluate on\n"


def _describe_method(recipe: Recipe, steps: int | None) -> str:
    """What is trained, and what the run leaves."""
    what = recipe.variant.summary(recipe.adapter_config(steps or UNKNOWN_STEPS))
    return f"# {what}; the run leaves {RunDirectory(recipe).result}\n"


def _describe_model(recipe: Recipe) -> str:
    """A line where the model's path is none that exists here and none that the Hub could have."""
    path = recipe.model.path
    local = Path(path).expanduser()
    if local.exists() or (path.count("/") <= 1 and local.suffix != ".gguf"):
        return ""
    return f"# {path} is not here: the run would stop there\n"
