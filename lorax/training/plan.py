"""What a recipe would do, said before it does it (`lorax train --dry-run`)."""

from pathlib import Path

from lorax.data.examples import find_kind
from lorax.data.rows import read_rows
from lorax.training.recipe import Recipe


def describe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, and what is known of the data without loading a model."""
    path = Path(recipe.data.path)
    if not path.is_file():
        found = f"# {path} is not here yet: rows and steps are not known"
    else:
        rows = read_rows(path)
        found = f"# {path}: {len(rows)} rows, kind: {find_kind(rows[0])}"
    train = recipe.train
    accumulation = -(-train.batch_size // train.micro_batch_size)
    return (
        f"{recipe.to_toml()}\n{found}\n"
        f"# a step: {train.batch_size} rows in {accumulation} micro-batches of at most "
        f"{train.micro_batch_size}\n"
        "# nothing was loaded and nothing was written"
    )
