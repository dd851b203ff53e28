"""Text from a model, a token at a time."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import overload

from lorax.adapters.tables import embedding_weight
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary
from lorax.errors import DataError, UsageError
from lorax.inference.batch import Sampling, stream_rows
from lorax.inference.named import named_adapters
from lorax.models import Model

log = logging.getLogger("lorax")


@overload
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    adapters: Sequence[str | None] | None = None,
) -> str: ...
@overload
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: list[str] | tuple[str, ...],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    adapters: Sequence[str | None] | None = None,
) -> list[str]: ...
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | list[str] | tuple[str, ...],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    adapters: Sequence[str | None] | None = None,
) -> str | list[str]:
    """Continue a prompt, or several, taken as they stand (no chat template is applied).

    Args:
        model: on any device; adapters, merged or not, take part.
        tokenizer: the model's.
        prompt: the text to continue; of several each is continued as if it were alone.
        max_new_tokens: where to stop if no end token comes.
        temperature: 0 takes the likeliest token each time; above, logits are divided by it and a
            token is drawn.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of each prompt's draws; None takes torch's global generator.
        batch_size: how many prompts are answered together: speed and memory only.
        adapters: each prompt's own, by the name that `load_adapter` gave it, None for the base
            alone; not given, all prompts have what the model has in use.

    Returns:
        The continuation alone, without special tokens; of several prompts a list.

    Raises:
        UsageError: see `stream`; of several prompts the message says which.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [tokenizer.encode(text) for text in texts]
    places = [""] if isinstance(prompt, str) else [f"prompt {n}: " for n in range(1, len(ids) + 1)]
    how = Sampling(temperature, top_p, seed)
    found = list(answers(model, tokenizer, ids, max_new_tokens, how, batch_size, places, adapters))
    return found[0] if isinstance(prompt, str) else found


def answers(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int = 8,
    places: Sequence[str] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[str]:
    """The answer to each prompt, in order, each as soon as it and those before it are there.

    Args:
        prompts: their tokens; all are looked at before anything is computed.
        places: what stands in front of an error about a prompt; "" if not given.
        max_new_tokens, sampling, batch_size, adapters: see `generate`.

    Raises:
        UsageError, DataError: as `stream`.
    """
    check_options(max_new_tokens, sampling.temperature, sampling.top_p)
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size} must be at least 1")
    if adapters is not None:
        named_adapters(model).check_rows(adapters, len(prompts))
    counts = []
    for ids, place in zip(prompts, places or [""] * len(prompts), strict=True):
        try:
            counts.append(check_prompt(model, tokenizer, ids, max_new_tokens))
        except (UsageError, DataError) as error:
            raise type(error)(f"{place}{error}") from None
    ends = tokenizer.end_token_ids
    rows = stream_rows(model, ends, prompts, counts, sampling, batch_size, adapters)
    return _in_order(rows, tokenizer)


def _in_order(rows: Iterator[tuple[int, int | None]], tokenizer: Tokenizer) -> Iterator[str]:
    made: defaultdict[int, list[int]] = defaultdict(list)
    ended: set[int] = set()
    following = 0
    for index, token in rows:
        if token is not None:
            made[index].append(token)
            continue
        ended.add(index)
        while following in ended:
            yield tokenizer.decode(made.pop(following, []), skip_special_tokens=True)
            following += 1


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
