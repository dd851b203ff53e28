"""The tokenizer that an adapter was trained with: its own directory's, else its base's.

TRL, axolotl and LLaMA-Factory save the tokenizer and the chat template into the adapter's
directory: the base may have no template, or another one. Piece by piece:

    adapter's directory                what is used
    a tokenizer                        that; the base's end tokens end an answer, too
    a chat template alone              the base's tokenizer with that template
    neither                            the base's
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

from lorax.data.tokenizer import Tokenizer
from lorax.errors import LoraxError
from lorax.formats.huggingface import load_tokenizer
from lorax.formats.tokenizer_files import read_template, read_tokenizer

_VOCABULARIES = ("tokenizer.json", "tekken.json", "tokenizer.model", "tiktoken.model", "vocab.json")


def load_adapter_tokenizer(adapter: Path | None, base: str | os.PathLike[str]) -> Tokenizer:
    """See above; `adapter` is its directory, or None for a plain model.

    Raises:
        FormatError: no tokenizer at either place, or one that is damaged.
    """
    if adapter is None:
        return load_tokenizer(base)
    if not any((adapter / name).is_file() for name in _VOCABULARIES):
        tokenizer = load_tokenizer(base)
        template = read_template(adapter)
        return tokenizer if template is None else _with(tokenizer, template=template)
    own = read_tokenizer(adapter)
    try:
        theirs = load_tokenizer(base)
    except LoraxError:  # a base without a tokenizer, or with one that is not needed
        return own
    pieces = [theirs.backend.id_to_token(end) for end in theirs.end_token_ids]
    same = [own.backend.token_to_id(piece) for piece in pieces if piece is not None]
    ends = [end for end in same if end is not None]
    return _with(own, template=own.chat_template or theirs.chat_template, ends=ends)


def _with(tokenizer: Tokenizer, template: str | None, ends: list[int] | None = None) -> Tokenizer:
    """The same tokenizer with this template, and more end tokens."""
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    changed.end_token_ids = tuple(dict.fromkeys([*tokenizer.end_token_ids, *(ends or [])]))
    return changed
