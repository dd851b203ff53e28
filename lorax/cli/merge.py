"""lorax merge: an adapter into its base, and what each way of it would lose."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import (
    BITSANDBYTES_4BIT,
    Base,
    CheckBase,
    Device,
    Dtype,
    Json,
    LocalPath,
    Positive,
    ResizeVocabulary,
)
from lorax.cli.terminal import note, out, print_json, say, tell


def merge(
    adapter: str,
    output: LocalPath | None = None,
    /,
    *,
    report: Annotated[
        bool, Parameter(help="First compare all routes, by layer and on text.", negative="")
    ] = False,
    route: Annotated[
        str | None,
        Parameter(
            help="float32, bfloat16 or float16 (dense, over the weights that were trained over); "
            "original-bfloat16 (over those from before quantization); nf4-dq (quantized again); "
            "nf4-dq+r16 (the same, with a residual adapter of rank 16)."
        ),
    ] = None,
    format: Annotated[str | None, Parameter(help=f"A 4-bit output: {BITSANDBYTES_4BIT}.")] = None,
    residual_rank: Annotated[
        int,
        Parameter(help="Keep what quantizing loses in an adapter of this rank, in OUT/residual."),
    ] = 0,
    text: Annotated[
        LocalPath | None, Parameter(help="The report's text; Python's own, if none.")
    ] = None,
    tokens: Annotated[Positive, Parameter(help="How many tokens of it.")] = 1024,
    base: Base = None,
    original: Annotated[
        str | None, Parameter(help="The weights from before quantization, if not the base's files.")
    ] = None,
    quantization: Annotated[
        str | None,
        Parameter(
            help="What the adapter was trained over: nf4-dq and the others, or none. A run's "
            "adapter knows it."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    check_base: CheckBase = True,
    resize_vocabulary: ResizeVocabulary = False,
    json: Json = False,
) -> None:
    """Merge an adapter into its base and write a model that transformers opens.

    Of the routes that give what is asked for, the one that loses least of the adapter is taken.
    Without --format that is a dense model in the base's dtype; over a quantized base it holds the
    dequantized weights, which are what a QLoRA adapter was trained over. Linears that the adapter
    leaves alone stay quantized.

    Parameters
    ----------
    adapter
        The adapter (directory or Hub id), or a run's directory.
    output
        The model's directory; must be missing or empty. Without it, --report writes nothing.
    dtype
        The base's in training, and the output's unless --route names another.
    """
    from lorax.merging import laboratory as merging
    from lorax.merging import report as merge_report

    merging.check_request(output, report, route, format, residual_rank, text)
    laboratory, tokenizer = merging.open_laboratory(
        adapter,
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        original=original,
        check_base=check_base,
        say=tell,
        resize_vocabulary=resize_vocabulary,
    )
    chosen = laboratory.requested(route, format, residual_rank)
    found = None
    if report:
        ids = merging.sample(tokenizer, laboratory.model.max_positions, text, tokens)
        laboratory.check_tokens(ids, tokenizer)
        compared = laboratory.routes(residual_rank, also=chosen)
        found = laboratory.compare(compared, ids, lambda name: note(f"measuring {name}"))
    cost = laboratory.choose(chosen, found)
    if not json:
        say(merge_report.summary(laboratory, cost))
        for table in merge_report.tables(found) if found is not None else ():
            out.print(table)
    if output is not None:
        laboratory.write(cost.route, output, tokenizer)
    if json:
        print_json(merge_report.as_dict(laboratory, found, cost, output))
        return
    for line in merge_report.written(cost, output):
        say(line)
