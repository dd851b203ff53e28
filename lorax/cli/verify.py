"""lorax verify: an adapter held against PEFT."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorax.cli.options import (
    BITSANDBYTES_4BIT,
    Base,
    Dtype,
    Json,
    LocalPath,
    Positive,
    ResizeVocabulary,
)
from lorax.cli.terminal import out, print_json, say, tell
from lorax.errors import UsageError

if TYPE_CHECKING:
    from lorax.parity.report import Report


def verify(
    adapter: str | None = None,
    /,
    *,
    run: Annotated[
        LocalPath | None,
        Parameter(help="A run's directory: replay its first steps in PEFT, in an adapter's place."),
    ] = None,
    steps: Annotated[Positive, Parameter(help="How many of the run's steps.")] = 10,
    base: Base = None,
    against: Annotated[str, Parameter(help="The other program: peft.")] = "peft",
    reference: Annotated[
        LocalPath | None, Parameter(help="Another adapter's directory, which PEFT reads instead.")
    ] = None,
    quantization: Annotated[
        str | None,
        Parameter(
            help=f"Quantize the base: {BITSANDBYTES_4BIT}; none: plain weights. Without it, "
            "as the adapter's run has it on record."
        ),
    ] = None,
    dtype: Dtype = "auto",
    text: Annotated[LocalPath | None, Parameter(help="A text file to run through both.")] = None,
    tokens: Annotated[Positive, Parameter(help="How many of its tokens.")] = 128,
    html: Annotated[
        LocalPath | None, Parameter(help="Write the report there, as one page.")
    ] = None,
    resize_vocabulary: ResizeVocabulary = False,
    json: Json = False,
) -> None:
    """Hold an adapter in lorax against the same adapter in the installed PEFT.

    Both load it independently and run forward, backward and merge in float32; each module's
    tensors, weights, outputs and gradients are compared. Exit code 0 only if all of it holds, 1 if
    not; then the first module where the two part is named, and which side is right.

    Parameters
    ----------
    adapter
        The adapter (directory or Hub id), or a run's directory.
    """
    if (adapter is None) == (run is None):
        raise UsageError("verify: give an adapter, or --run RUN for a run's steps; one of the two")
    if run is not None:
        from lorax.parity.whole_run import verify_run

        report: Report = verify_run(run, steps, say=tell)
    else:
        from lorax.parity.against_peft import verify as hold_against

        assert adapter is not None
        report = hold_against(
            adapter,
            base,
            against=against,
            reference=reference,
            quantization=quantization,
            dtype=dtype,
            text=text,
            tokens=tokens,
            resize_vocabulary=resize_vocabulary,
            say=tell,
        )
    if html is not None:
        report.write_html(html)
    if json:
        print_json(report.as_dict())
    else:
        from lorax.parity.report import table

        out.print(table(report))
        say(str(report))
        if html is not None:
            say(f"report   {html}")
    if not report.holds:
        sys.exit(1)
