"""Token ids held against the rows of the model's embedding.

A tokenizer may have tokens that its model has no row for: a pad token or a chat's tokens that were
added to the tokenizer while the embedding was not resized. Padding is masked, so any id does; any
other such token is refused by name.
"""

from collections.abc import Iterable

from lorax.data.tokenizer import Tokenizer
from lorax.errors import DataError


def check_vocabulary(ids: Iterable[int], vocabulary: int, tokenizer: Tokenizer) -> None:
    """Refuse ids that the embedding of `vocabulary` rows does not have.

    Raises:
        DataError: the first such token with its id.
    """
    for token_id in ids:
        if token_id >= vocabulary:
            text = tokenizer.backend.id_to_token(token_id)
            raise DataError(
                f"token {text!r} has id {token_id}, but the model's embedding has {vocabulary} "
                "rows; resize the model to its tokenizer, or use the tokenizer that belongs to it"
            )


def padding_id(pad_id: int, vocabulary: int) -> int:
    """What to pad with: the pad token if the embedding has it, else 0; it is masked."""
    return pad_id if pad_id < vocabulary else 0
