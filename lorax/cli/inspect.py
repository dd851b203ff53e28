"""lorax inspect: reports on a model, an adapter, a run or a recipe."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

from lorax.cli.options import Json, LocalPath, PlainDtype
from lorax.cli.overrides import Overrides, read_recipe
from lorax.cli.terminal import print_found, print_json, say
from lorax.quant import codebooks

inspect = App(
    name="inspect",
    help="Look into a model, an adapter or a run: lorax inspect quantization MODEL, "
    "... adapter PATH, ... optimizer RUN, ... data RECIPE, ... loss RECIPE, ... diff RUN RUN",
)


@inspect.command(name="quantization")
def inspect_quantization(
    model: str,
    /,
    *,
    format: Annotated[
        tuple[str, ...], Parameter(help="Formats to compare.", consume_multiple=True)
    ] = codebooks.formats(),
    block_size: Annotated[
        tuple[int, ...], Parameter(help="Block sizes to compare.", consume_multiple=True)
    ] = (64,),
    dtype: PlainDtype = "auto",
    tensors: Annotated[bool, Parameter(help="A line for each tensor too.", negative="")] = False,
    plot: Annotated[LocalPath | None, Parameter(help="Write the picture there, as PNG.")] = None,
    json: Json = False,
) -> None:
    """What quantizing would cost a model's weights: bits, error, the worst rows.

    Parameters
    ----------
    model
        A directory, Hub id or .gguf file.
    """
    from lorax.inspect import quantization as report

    errors = report.inspect_quantization(model, format, block_size, dtype)
    if plot is not None:
        report.plot(errors, plot)
    if json:
        print_json(report.as_dict(errors))
        return
    print_found([report.table(errors), *(report.lines(errors) if tensors else ())])
    if plot is not None:
        say(f"picture  {plot}")


@inspect.command(name="adapter")
def inspect_adapter(
    path: LocalPath,
    /,
    *,
    against: Annotated[
        LocalPath | None, Parameter(help="Another adapter of the same base.")
    ] = None,
    json: Json = False,
) -> None:
    """How large an adapter's change is, layer by layer, and the angle to another adapter.

    Parameters
    ----------
    path
        A PEFT LoRA directory; no base model is needed.
    """
    from lorax.inspect import adapter as report

    found = report.inspect_adapter(path, against)
    print_found(report.as_dict(found) if json else [report.table(found)])


@inspect.command(name="optimizer")
def inspect_optimizer(path: str, /, *, json: Json = False) -> None:
    """What a run's optimizer holds, by name, and what paging has moved.

    Parameters
    ----------
    path
        A run's directory, a checkpoint's directory, or an optimizer state's file.
    """
    from lorax.inspect import optimizer as report

    found = report.inspect_optimizer(path)
    print_found(found.as_dict() if json else report.parts(found))


@inspect.command(name="data")
def inspect_data(
    recipe: LocalPath,
    /,
    *overrides: Overrides,
    show: Annotated[int, Parameter(help="How many rows to show token by token.")] = 3,
    max_truncated: Annotated[
        float, Parameter(help="The share of rows whose answers may be cut.")
    ] = 0.1,
    html: Annotated[LocalPath | None, Parameter(help="Write the page there, too.")] = None,
    json: Json = False,
) -> None:
    """What a recipe's rows become: tokens, loss mask, lengths; exit code 1 where rows are wrong.

    Parameters
    ----------
    recipe
        A TOML file; its keys can be given by their paths, as for train.
    """
    from lorax.inspect import data as report

    checked = read_recipe(recipe, overrides)
    found = report.inspect_data(checked, show, max_truncated)
    if html is not None:
        report.write_html(found, html)
    print_found(found.as_dict() if json else report.parts(found))
    if html is not None and not json:
        say(f"page  {html}")
    sys.exit(0 if found.holds else 1)


@inspect.command(name="loss")
def inspect_loss(
    recipe: LocalPath,
    /,
    *overrides: Overrides,
    json: Json = False,
) -> None:
    """Whether loss and gradients of a step depend on micro-batches, padding or order; 1 if so.

    Parameters
    ----------
    recipe
        A TOML file; its keys can be given by their paths, as for train.
    """
    from lorax.inspect import loss as report

    found = report.inspect_loss(read_recipe(recipe, overrides))
    print_found(found.as_dict() if json else report.parts(found))
    sys.exit(0 if found.holds else 1)


@inspect.command(name="diff")
def inspect_diff(first: LocalPath, second: LocalPath, /, *, json: Json = False) -> None:
    """The first step and tensor in which two runs with train.digests differ; 1 if they do.

    Parameters
    ----------
    first, second
        Two runs' directories.
    """
    from lorax.inspect.runs import compare_runs

    found = compare_runs(first, second)
    print_found(found.as_dict() if json else [found.verdict])
    sys.exit(0 if found.holds else 1)
