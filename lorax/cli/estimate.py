"""lorax estimate: what a training will take, before there is a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import Device, Json, LocalPath, Positive
from lorax.cli.overrides import Overrides, read_recipe
from lorax.cli.terminal import print_found, say


def estimate(
    model: str,
    /,
    *overrides: Overrides,
    method: Annotated[
        tuple[str, ...], Parameter(help="full, lora, qlora.", consume_multiple=True)
    ] = ("full", "lora", "qlora"),
    optimizer: Annotated[
        tuple[str, ...], Parameter(help="As in a recipe's train.optimizer.", consume_multiple=True)
    ] = ("adamw",),
    r: Annotated[tuple[Positive, ...], Parameter(help="Ranks.", consume_multiple=True)] = (16,),
    target_modules: Annotated[
        tuple[str, ...], Parameter(help="Names; all-linear.", consume_multiple=True)
    ] = ("all-linear",),
    batch: Annotated[Positive, Parameter(help="Rows in a forward pass.")] = 1,
    length: Annotated[
        tuple[Positive, ...], Parameter(help="Tokens of a row.", consume_multiple=True)
    ] = (512,),
    dtype: Annotated[str, Parameter(help="Of the weights; auto: as they are stored.")] = "auto",
    quantization: Annotated[str, Parameter(help="The format of qlora.")] = "nf4-dq",
    gradient_checkpointing: Annotated[
        bool, Parameter(help="Recompute activations in the backward pass.", negative="")
    ] = False,
    device: Device = "cuda",
    plot: Annotated[LocalPath | None, Parameter(help="Write the picture there, as PNG.")] = None,
    json: Json = False,
) -> None:
    """Parameters and memory of a training: lorax estimate Llama-2-7b --method lora qlora

    Of a recipe: of its run, on its device; keys can be given by their paths, as for train. Of a
    model: a row for each combination, and where it fits. No weights are read.

    Parameters
    ----------
    model
        A recipe (.toml), a model's directory, a config.json, a .gguf file, or a name such as
        Llama-2-7b, Meta-Llama-3-8B, Mistral-7B-v0.1, Qwen2.5-7B, SmolLM2-135M, gpt2.
    """
    from lorax.inspect.estimate import report
    from lorax.inspect.estimate.compare import estimate_model, estimate_recipe

    if Path(model).suffix == ".toml":
        one = estimate_recipe(read_recipe(Path(model).expanduser(), overrides))
        found, shown = [one], report.parts(one)
    else:
        _refuse(overrides)
        targets = target_modules[0] if target_modules == ("all-linear",) else list(target_modules)
        choices = {"method": method, "optimizer": optimizer, "r": r, "length": length}
        settings = {"batch": batch, "checkpointing": gradient_checkpointing, "device": device}
        found = estimate_model(
            model, choices, dtype, target_modules=targets, quantization=quantization, **settings
        )
        shown = report.table(found) if len(found) > 1 else report.parts(found[0])
    if plot is not None:
        report.plot(found, plot)
    if json:
        print(report.to_json(found[0] if Path(model).suffix == ".toml" else found))
        return
    print_found(shown)
    if plot is not None:
        say(f"picture  {plot}")


def _refuse(overrides: tuple[str, ...]) -> None:
    """Keys of a recipe go with a recipe."""
    from lorax.errors import UsageError

    for token in overrides[:1]:
        raise UsageError(
            f"{token}: is no option of a model's estimate; give a recipe, which takes its keys"
        )
