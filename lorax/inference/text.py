"""Text of tokens while they are still being made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lorax.data.tokenizer import Tokenizer


class TextOfTokens:
    """Pieces of text, each as soon as its last character is whole.

    Together they are what the tokenizer makes of all tokens, without special ones.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.made: list[int] = []
        self.given = 0

    def add(self, token: int) -> str:
        """What one more token adds; "" while a character is half."""
        self.made.append(token)
        text = self.tokenizer.decode(self.made, skip_special_tokens=True)
        return "" if text.endswith("\ufffd") else self._behind(text)

    def rest(self) -> str:
        """What was held back, behind the last token."""
        return self._behind(self.tokenizer.decode(self.made, skip_special_tokens=True))

    def _behind(self, text: str) -> str:
        piece = text[self.given :]
        self.given = len(text)
        return piece


def as_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The tokens' text in pieces, as `TextOfTokens` has them."""
    text = TextOfTokens(tokenizer)
    for token in tokens:
        piece = text.add(token)
        if piece:
            yield piece
    yield text.rest()
