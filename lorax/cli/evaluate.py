"""lorax evaluate: loss and perplexity on rows of data."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import AS_IT_IS, Json, LocalPath, Opening, Positive
from lorax.cli.terminal import print_json, say


def evaluate(
    path: str,
    *,
    data: LocalPath,
    max_length: Annotated[Positive, Parameter(help="Tokens of a row; longer ones are cut.")] = 512,
    micro_batch_size: Annotated[
        Positive, Parameter(help="Rows in one forward pass: memory and speed only.")
    ] = 4,
    opening: Opening = AS_IT_IS,
    json: Json = False,
) -> None:
    """Loss and perplexity of a model, or of a model with an adapter, on rows of data.

    Parameters
    ----------
    path
        A model (directory, Hub id or .gguf), an adapter (directory or Hub id) or a run's directory.
    data
        A jsonl, json, csv or parquet file, of any kind that training takes.
    """
    from lorax.training.evaluate import evaluate_file

    model, tokenizer = opening.open(path)
    found = evaluate_file(model, tokenizer, data, max_length, micro_batch_size)
    if json:
        print_json(found)
        return
    say(
        f"loss {found['eval_loss']:.4f} nats   perplexity {found['eval_perplexity']:.3f}   "
        f"({found['tokens']} tokens in {found['rows']} rows; base {found['base']} in "
        f"{found['dtype']}, {found['quantization'] or 'not quantized'})"
    )
