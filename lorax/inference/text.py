"""Text of tokens while they are still being made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lorax.data.tokenizer import Tokenizer


def as_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The tokens' text in pieces, each as soon as its last character is whole.

    Together they are what the tokenizer makes of all tokens, without special ones.
    """
    made: list[int] = []
    given = ""
    for token in tokens:
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            yield text[len(given) :]
            given = text
    yield tokenizer.decode(made, skip_special_tokens=True)[len(given) :]
