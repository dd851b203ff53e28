"""lorax evaluate: loss and perplexity on rows of data."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from lorax.cli.options import AS_IT_IS, Json, LocalPath, Opening, Positive
from lorax.cli.terminal import out, print_json


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
    from lorax.adapters.tables import embedding_weight
    from lorax.data.examples import load_examples
    from lorax.data.vocabulary import check_vocabulary
    from lorax.quant.quantize import stored_format
    from lorax.training.evaluate import evaluate as measure

    model, tokenizer = opening.open(path)
    examples = load_examples(data, tokenizer, max_length)
    for row in examples.rows:
        check_vocabulary(row.ids, embedding_weight(model).shape[0], tokenizer)
    result: dict[str, Any] = measure(model, examples.rows, micro_batch_size, tokenizer.pad_token_id)
    numbers = str(embedding_weight(model).dtype).removeprefix("torch.")
    result |= {"rows": len(examples), "tokens": sum(row.tokens for row in examples.rows)}
    format = stored_format(model)
    result |= {"base": model.name_or_path, "dtype": numbers, "quantization": format}
    if json:
        print_json(result)
    else:
        out.print(
            f"loss {result['eval_loss']:.4f} nats   perplexity {result['eval_perplexity']:.3f}   "
            f"({result['tokens']} tokens in {result['rows']} rows; base {model.name_or_path} in "
            f"{numbers}, {format or 'not quantized'})",
            soft_wrap=True,
        )
