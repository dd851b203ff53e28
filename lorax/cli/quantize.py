"""lorax quantize: a copy of a model in 4 or 8 bits."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import Json, LocalPath, PlainDtype, Positive
from lorax.cli.terminal import err, out, print_json
from lorax.quant import names


def quantize(
    model: str,
    output: LocalPath,
    /,
    *,
    format: Annotated[
        str, Parameter(help=f"{names.listed(names.bitsandbytes_formats())}.")
    ] = "nf4-dq",
    block_size: Annotated[
        int | None, Parameter(help="Values that share a scale: 32 to 4096, by default 64.")
    ] = None,
    dtype: PlainDtype = "auto",
    max_shard_bytes: Annotated[Positive, Parameter(help="The largest file.")] = 5 * 10**9,
    json: Json = False,
) -> None:
    """Write a copy of a model in 4 or 8 bits that lorax and transformers + bitsandbytes open.

    Tensor by tensor, in memory of about one output file.

    Parameters
    ----------
    model
        A model: directory, Hub id or .gguf.
    output
        The copy's directory; must be missing or empty. The tokenizer's files come along.
    """
    from lorax.formats.quantize_model import quantize_model
    from lorax.heap import give_memory_back
    from lorax.progress import TensorProgress

    give_memory_back()
    with TensorProgress(err if json else out) as progress:
        result = quantize_model(
            model,
            output,
            format,
            block_size=block_size,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    if json:
        print_json(result.as_dict())
    else:
        out.print(str(result), soft_wrap=True)
        out.print(f"wrote {output}", soft_wrap=True)
