"""Text from a model, a token at a time."""

import logging
from collections.abc import Iterator

from lorax.adapters.tables import embedding_weight
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary
from lorax.errors import UsageError
from lorax.inference.batch import Sampling, stream_rows
from lorax.models import Model

log = logging.getLogger("lorax")


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> str:
    """Continue a prompt, which is taken as it stands (no chat template is applied).

    Args:
        model: on any device; adapters, merged or not, take part.
        tokenizer: the model's.
        prompt: the text to continue.
        max_new_tokens: where to stop if no end token comes.
        temperature: 0 takes the likeliest token each time; above, logits are divided by it and a
            token is drawn.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws; None takes torch's global generator.

    Returns:
        The continuation alone, without special tokens.
    """
    ids = tokenizer.encode(prompt)
    tokens = list(stream(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed))
    return tokenizer.decode(tokens, skip_special_tokens=True)


def stream(
    model: Model,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[int]:
    """The new tokens one by one, as they are made; the end token itself is not given.

    Where max_new_tokens goes past the model's positions it is cut, and the log says so in one line.

    Raises:
        UsageError: an empty prompt, one longer than the model's positions, or a temperature,
            top_p or count out of range. DataError: a token that the embedding does not have.
    """
    check_options(max_new_tokens, temperature, top_p)
    count = check_prompt(model, tokenizer, ids, max_new_tokens)
    sampling = Sampling(temperature, top_p, seed)
    rows = stream_rows(model, tokenizer.end_token_ids, [ids], [count], sampling)
    return (token for _, token in rows if token is not None)


def check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise UsageError where one of them is out of range."""
    if not temperature >= 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise UsageError(
            f"temperature {temperature} (>= 0), top_p {top_p} (in (0, 1]) or max_new_tokens "
            f"{max_new_tokens} (>= 0) is out of range; give each a value within its bounds"
        )


def check_prompt(model: Model, tokenizer: Tokenizer, ids: list[int], max_new_tokens: int) -> int:
    """How many new tokens the model's positions leave room for, at most `max_new_tokens`.

    Raises:
        UsageError: no token, or none that is left. DataError: a token without an embedding.
    """
    check_vocabulary(ids, embedding_weight(model).shape[0], tokenizer)
    room = model.max_positions - len(ids)
    if not ids or room < 1:
        raise UsageError(
            f"the prompt has {len(ids)} tokens; expected 1 to {model.max_positions - 1}, which "
            "leaves room for an answer in the model's positions: shorten it"
        )
    if max_new_tokens > room:
        log.warning(
            "max_new_tokens %d is cut to %d: the model has %d positions, the prompt takes %d",
            *(max_new_tokens, room, model.max_positions, len(ids)),
        )
    return min(max_new_tokens, room)
