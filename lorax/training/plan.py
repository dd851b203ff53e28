"""What a recipe would do, said before it does it (`lorax train --dry-run`)."""

from pathlib import Path

from lorax.data.examples import find_kind
from lorax.data.rows import read_rows
from lorax.training.recipe import Recipe
from lorax.training.schedule import total_steps


def describe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, and what is known of the data without loading a model."""
    train = recipe.train
    accumulation = -(-train.batch_size // train.micro_batch_size)
    return (
        f"{recipe.to_toml()}\n{_describe_model(recipe)}{_describe_data(recipe)}"
        f"# a step: {train.batch_size} rows in {accumulation} micro-batches of at most "
        f"{train.micro_batch_size}\n"
        "# nothing was loaded and nothing was written"
    )


def _describe_data(recipe: Recipe) -> str:
    path = Path(recipe.data.path)
    if not path.is_file():
        return f"# {path} is not here: rows and steps are not known\n"
    rows = read_rows(path)
    held_out = round(len(rows) * recipe.data.eval_fraction)
    steps = total_steps(recipe, len(rows) - held_out)
    return (
        f"# {path}: {len(rows)} rows, kind: {find_kind(rows[0])}, {held_out} of them held out\n"
        f"# {steps} optimizer steps, unless rows are dropped for their length\n"
    )


def _describe_model(recipe: Recipe) -> str:
    """A line where the model's path is none that exists here and none that the Hub could have."""
    path = recipe.model.path
    local = Path(path).expanduser()
    if local.exists() or (path.count("/") <= 1 and local.suffix != ".gguf"):
        return ""
    return f"# {path} is not here: the run would stop there\n"
