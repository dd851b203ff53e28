"""Loss and perplexity on rows that are not trained on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorax.adapters.tables import embedding_weight
from lorax.data.batches import micro_batches
from lorax.data.examples import Example, load_examples
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary, padding_id
from lorax.models import Model
from lorax.quant.quantize import stored_format
from lorax.training.loss import summed_loss
from lorax.training.processes import Processes


def evaluate(
    model: Model,
    rows: Sequence[Example],
    micro_batch_size: int,
    pad_id: int,
    room: int | None = None,
    group: Processes | None = None,
) -> dict[str, float]:
    """Mean loss in nats over all trained tokens of the rows, and its exponential.

    Args:
        room: tokens of a packed forward pass; None pads `micro_batch_size` rows.
        group: the processes that share the work, each with the same rows; None: this one.

    Returns:
        {"eval_loss", "eval_perplexity"}. The model is in eval mode inside, and as before after.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    pad_id = padding_id(pad_id, embedding_weight(model).shape[0])
    group = group or Processes()
    size = group.micro_batch_size(len(rows), micro_batch_size)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        rows = sorted(rows, key=lambda row: len(row.ids), reverse=True)  # little padding
        for batch in group.share(micro_batches(rows, size, pad_id, room)):
            batch = batch.to(device)
            total += summed_loss(model, *batch).item()
    model.train(was_training)
    loss = group.total(total).item() / sum(row.tokens for row in rows)
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss) if loss < 700 else math.inf}


def evaluate_file(
    model: Model, tokenizer: Tokenizer, path: Path, max_length: int, micro_batch_size: int
) -> dict[str, Any]:
    """`evaluate` on the rows of a file, and what it was that was evaluated.

    Args:
        path: rows of any kind that training takes; those of more than max_length tokens are cut.

    Returns:
        {"eval_loss", "eval_perplexity", "rows", "tokens": the trained ones, "base": its name,
        "dtype": the embedding's, "quantization": the base's, or None}.

    Raises:
        DataError: the rows cannot be read, or one has a token that the embedding lacks.
    """
    examples = load_examples(path, tokenizer, max_length)
    table = embedding_weight(model)
    for row in examples.rows:
        check_vocabulary(row.ids, table.shape[0], tokenizer)
    found = evaluate(model, examples.rows, micro_batch_size, tokenizer.pad_token_id)
    return {
        **found,
        "rows": len(examples),
        "tokens": sum(row.tokens for row in examples.rows),
        "base": model.name_or_path,
        "dtype": str(table.dtype).removeprefix("torch."),
        "quantization": stored_format(model),
    }
