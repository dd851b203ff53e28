"""The rows that `lorax verify` sends through both programs: real text, or random tokens."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lorax.data.docstrings import HELD_OUT_MODULES, pairs
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary
from lorax.errors import DataError, UsageError
from lorax.files import require
from lorax.models import Model

ROW_TOKENS = 64


def batch(
    tokenizer: Tokenizer, model: Model, text: str | os.PathLike[str] | None, tokens: int
) -> Tensor:
    """The first tokens of the text, in rows of up to 64: (B, T) int64.

    Raises:
        UsageError: fewer than two tokens. DataError: the file cannot be read, or the tokenizer
            gives ids that the model has no place for.
    """
    ids = tokenizer.encode(_read(text))[:tokens]
    width = min(ROW_TOKENS, model.max_positions, len(ids))
    rows = len(ids) // width if width else 0
    if width < 2:
        raise UsageError(f"the text has {len(ids)} tokens; expected at least 2")
    check_vocabulary(ids, model.config.vocab_size, tokenizer)
    return torch.tensor(ids[: rows * width]).view(rows, width)


def random_batch(model: Model, tokens: int) -> Tensor:
    """The same shape of random tokens, always the same ones: (B, T) int64."""
    width = min(ROW_TOKENS, model.max_positions, tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (tokens // width, width)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def _read(text: str | os.PathLike[str] | None) -> str:
    if text is None:
        return "\n\n".join(answer for _, answer in pairs(HELD_OUT_MODULES[:3]))
    require(text)
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{os.fspath(text)}: cannot be read ({reason}); expected a text file in UTF-8"
        ) from None
