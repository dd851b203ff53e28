"""lorax train: a run from a recipe."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import LocalPath
from lorax.cli.overrides import Overrides, read_recipe
from lorax.cli.terminal import out, say, warn


def train(
    recipe: LocalPath,
    /,
    *overrides: Overrides,
    resume: Annotated[
        bool, Parameter(help="Go on from the newest checkpoint of that run.", negative="")
    ] = False,
    dry_run: Annotated[bool, Parameter(help="Check and print the plan only.", negative="")] = False,
) -> None:
    """Train a recipe: lorax train recipe.toml --train.learning_rate 1e-4 --data.path my.jsonl

    Any key of the recipe can be given by its path, and then wins over the file. A value is
    read as TOML: --adapter.target_modules '["q_proj", "v_proj"]'. --dry-run prints the plan.

    Parameters
    ----------
    recipe
        A TOML file; configs/ has some to start from.
    """
    checked = read_recipe(recipe, overrides)
    if dry_run:
        from lorax.training.plan import describe

        out.print(describe(checked), soft_wrap=True)
        return
    from lorax.inspect.estimate.watch import MemoryWatch
    from lorax.progress import TrainingProgress
    from lorax.training.loop import train as run_recipe

    if checked.runtime.threads:
        import torch

        torch.set_num_threads(checked.runtime.threads)
    with TrainingProgress(out) as progress, MemoryWatch(progress, say, warn) as watch:
        run = run_recipe(checked, watch, resume=resume)
    say(f"{run.result.name:<8} {run.result}")
    if (run.output_dir / "loss.png").is_file():
        say(f"picture  {run.output_dir / 'loss.png'}")
