"""Loss and perplexity on rows that are not trained on."""

import math
from collections.abc import Sequence

import torch

from lorax.adapters.tables import embedding_weight
from lorax.data.batches import micro_batches
from lorax.data.examples import Example
from lorax.data.vocabulary import padding_id
from lorax.models import Model
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
