"""lorax adapter: calculating with adapters."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from lorax.cli.options import LocalPath, Positive
from lorax.cli.terminal import say

adapter = App(name="adapter", help="Calculate with adapters: lorax adapter add A B --output SUM")


@adapter.command(name="add")
def add_adapters(
    *paths: LocalPath,
    output: LocalPath,
    weights: Annotated[
        tuple[float, ...],
        Parameter(
            help="One for each, such as 1 -0.5; 1 where none are given.",
            consume_multiple=True,
        ),
    ] = (),
    rank: Annotated[
        Positive | None, Parameter(help="Truncate each layer of the sum to this rank.")
    ] = None,
) -> None:
    """Write the weighted sum of adapters as an adapter: exact, of the sum of their ranks.

    Parameters
    ----------
    paths
        PEFT LoRA directories of one base; no base model is needed.
    output
        The sum's directory; must be missing or empty.
    """
    from lorax.formats.adapter_data import weighted_sum, write_adapter
    from lorax.formats.directory import check_free

    check_free(output)
    total = weighted_sum(paths, weights)
    if rank is not None:
        total, errors = total.truncate(rank)
        worst = max(errors, key=lambda name: errors[name])
        say(f"truncating to rank {rank} lost {100 * errors[worst]:.2f} % at most ({worst})")
    write_adapter(total, output)
    say(f"wrote {output}")
