"""What a recipe would do, said before it does it (`lorax train --dry-run`)."""

from pathlib import Path

from lorax.adapters.adalora_config import AdaLoRAConfig
from lorax.adapters.prompt_config import PromptTuningConfig
from lorax.data.kinds import find_kind, rename
from lorax.data.rows import Row, read_rows
from lorax.formats.directory import check_free
from lorax.training.recipe import Recipe
from lorax.training.schedule import total_steps


def describe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, and what is known of the data without loading a model.

    Raises:
        UsageError: the output directory is taken, as the run itself would say.
    """
    check_free(Path(recipe.train.output_dir))
    train = recipe.train
    accumulation = -(-train.batch_size // train.micro_batch_size)
    path = Path(recipe.data.path)
    rows = rename(read_rows(path), recipe.data.columns, path) if path.is_file() else None
    held_out = round(len(rows) * recipe.data.eval_fraction) if rows else 0
    steps = total_steps(recipe, len(rows) - held_out) if rows else recipe.train.max_steps
    return (
        f"{recipe.to_toml()}\n{_describe_model(recipe)}"
        f"{_describe_data(path, rows, held_out, steps)}"
        f"# a step: {train.batch_size} rows in {accumulation} micro-batches of at most "
        f"{train.micro_batch_size}\n"
        f"{_describe_method(recipe, steps)}"
        "# nothing was loaded and nothing was written"
    )


def _describe_data(path: Path, rows: list[Row] | None, held_out: int, steps: int | None) -> str:
    if not rows:
        return f"# {path} is not here: rows and steps are not known\n"
    kind = find_kind(rows[0])
    return (
        f"# {path}: {len(rows)} rows, kind: {kind.name}, {held_out} of them held out\n"
        f"# {steps} optimizer steps, unless rows are dropped for their length\n"
    )


def _describe_method(recipe: Recipe, steps: int | None) -> str:
    """What is trained, and what the run leaves."""
    config = recipe.adapter_config(steps or 2**62)
    output = recipe.train.output_dir
    if config is None:
        return f"# every weight is trained, in float32; the run leaves {output}/model\n"
    if isinstance(config, PromptTuningConfig):
        what = f"{config.num_virtual_tokens} virtual tokens in front of each row"
    elif isinstance(config, AdaLoRAConfig):
        last = config.last_allocation if steps else f"the last but {config.tfinal}"
        what = (
            f"AdaLoRA: from rank {config.init_r} to {config.target_r} on average, "
            f"in steps {config.tinit + 1} to {last}"
        )
    else:
        what = f"LoRA of rank {config.r}"
    return f"# {what}; the run leaves {output}/adapter\n"


def _describe_model(recipe: Recipe) -> str:
    """A line where the model's path is none that exists here and none that the Hub could have."""
    path = recipe.model.path
    local = Path(path).expanduser()
    if local.exists() or (path.count("/") <= 1 and local.suffix != ".gguf"):
        return ""
    return f"# {path} is not here: the run would stop there\n"
