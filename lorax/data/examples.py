"""From a row to token ids with a loss mask.

A row becomes segments of text, each trained or not, whose tokens are put behind each other. So the
mask goes by position. It never asks whether a token looks like padding or like an answer, and so
the end token is learned even where it is the pad token too. Cutting at the seams also shows the
model the very tokens that it will meet when it generates: the prompt's own, never one that the
tokenizer has merged across the seam.

What the columns of a row mean is in `lorax.data.kinds`, where an answer stands in a rendered
conversation in `lorax.data.answers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax.data.answers import find_answers
from lorax.data.conversation import Conversation
from lorax.data.kinds import (
    Column,
    Kind,
    PromptAndAnswer,
    Question,
    check_kind,
    find_kind,
    read_row,
    rename,
)
from lorax.data.rows import Row, read_rows
from lorax.data.tokenizer import Tokenizer
from lorax.errors import DataError, TemplateError, UsageError

# Stanford Alpaca's wording (Taori et al. 2023), for models without a chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """ids, and for each whether the model is trained to say it."""

    ids: list[int]
    trained: list[bool]

    @property
    def tokens(self) -> int:
        """How many tokens are trained; a row's first one has nothing before it to learn from."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Examples:
    """A file's rows, ready for training, and what happened on the way."""

    rows: list[Example]
    kind: str
    truncated: int
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether it is an answer."""

    text: str
    trained: bool
    is_rendered: bool = False  # by a chat template, which writes its own end tokens


def load_examples(
    path: Path,
    tokenizer: Tokenizer,
    max_length: int,
    columns: Mapping[Column, str] | None = None,
) -> Examples:
    """Read a file, find out its kind, encode its rows.

    A row longer than `max_length` tokens is cut there; one that then has nothing to train on is
    dropped. Both are counted. `columns` maps lorax's names to the file's.

    Raises:
        DataError: the file or a row of it cannot be used, with file and line.
    """
    rows = rename(read_rows(path), columns, path)
    kind = find_kind(rows[0])
    examples, truncated = [], 0
    for row in rows:
        try:
            check_kind(row, kind)
            example = encode(_segments(row, kind, tokenizer, bool(columns)), tokenizer)
        except (TemplateError, UsageError) as error:
            raise DataError(f"{row[1]}: {error}") from None
        if len(example.ids) > max_length:
            truncated += 1
            example = Example(example.ids[:max_length], example.trained[:max_length])
        if example.tokens:
            examples.append(example)
    if not examples:
        raise DataError(
            f"{path}: no row has anything to train on within {max_length} tokens"
            "; give a greater max_length, or rows whose answers begin earlier"
        )
    return Examples(examples, kind.name, truncated, len(rows) - len(examples))


def read_checked(path: Path, columns: Mapping[Column, str] | None = None) -> list[Row]:
    """The rows of a file, each looked at as training does, as far as no tokenizer is needed.

    Raises:
        DataError: the file or a row of it cannot be used, with file and line.
    """
    rows = rename(read_rows(path), columns, path)
    kind = find_kind(rows[0])
    for row in rows:
        check_kind(row, kind)
        read_row(row, kind, bool(columns))
    return rows


def encode(segments: list[Segment], tokenizer: Tokenizer) -> Example:
    """Encode segments behind each other.

    A segment's tokens are what the text gains by it (Llama 2's tokenizer puts a space before each
    text, and an answer is no text of its own); where that changes a token before the seam, the
    tokens of the segment alone. Nothing reaches across a special token, so the text before a
    segment is looked at from the last one on.
    """
    ids: list[int] = []
    trained: list[bool] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    special = _special_tokens(tokenizer)
    text = ""
    before: list[int] = []  # what stands before a segment, in tokens
    for segment in segments:
        text += segment.text
        whole = tokenizer.encode(text, add_special_tokens=False)
        if whole[: len(before)] == before:
            part = whole[len(before) :]
        else:
            part = tokenizer.encode(segment.text, add_special_tokens=False)
        before = whole
        last = _last_match(special, segment.text)
        if last is not None:
            text = segment.text[last:]
            before = tokenizer.encode(text, add_special_tokens=False)
        if segment.trained and not segment.is_rendered and part[-1:] != end:
            part += end
        answer = _through_end(part, tokenizer) if segment.trained else 0
        ids += part
        trained += [True] * answer + [False] * (len(part) - answer)
    if not segments[0].is_rendered and ids[:1] != tokenizer.prefix:
        ids = tokenizer.prefix + ids
        trained = [False] * len(tokenizer.prefix) + trained
    return Example(ids, trained)


def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What the tokenizer takes out of a text, as it stands, before all else."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    texts = [token.content for token in added if token.special and not token.normalized]
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _last_match(pattern: re.Pattern[str] | None, text: str) -> int | None:
    start = None
    for found in pattern.finditer(text) if pattern else ():
        start = found.start()
    return start


def _through_end(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of an answer's tokens are trained: through the last end token, if it has one."""
    for index in reversed(range(len(ids))):
        if ids[index] in tokenizer.end_token_ids:
            return index + 1
    return len(ids)


def _segments(row: Row, kind: Kind, tokenizer: Tokenizer, ignores_context: bool) -> list[Segment]:
    said = read_row(row, kind, ignores_context)
    if isinstance(said, PromptAndAnswer):
        prompt = [Segment(said.prompt, False)] if kind.name != "text" else []
        return [*prompt, Segment(said.answer, True)]
    if isinstance(said, Question):
        if tokenizer.chat_template is None:
            return _in_alpacas_words(said, row[1])
        said = said.conversation
    return _chat_segments(said, tokenizer)


def chat_segments(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> list[Segment]:
    """Cut a rendered conversation into what the assistant says and the rest.

    Args:
        messages: {"role", "content", ...} each; those of "assistant" are what is trained.

    Returns:
        pieces that together are what the chat template makes of the conversation.

    Raises:
        TemplateError: the template fails, leaves out a message, or changes an answer so that its
            place in the text cannot be found.
    """
    trained = [message["role"] == "assistant" for message in messages]
    return _chat_segments(Conversation(messages, trained), tokenizer)


def _chat_segments(talk: Conversation, tokenizer: Tokenizer) -> list[Segment]:
    text, spans = find_answers(talk, tokenizer)
    segments, position = [], 0
    for start, end in spans:
        segments.append(Segment(text[position:start], False, is_rendered=True))
        segments.append(Segment(text[start:end], True, is_rendered=True))
        position = end
    rest = text[position:]
    return [*segments, Segment(rest, False, is_rendered=True)] if rest else segments


def _in_alpacas_words(said: Question, where: str) -> list[Segment]:
    talk = said.conversation
    if talk.variables or len(talk.messages) > 2:
        raise DataError(
            f"{where}: system, history or tools need a chat template, and this model has none"
            "; choose a model with one, or leave these columns out"
        )
    form = ALPACA_WITH_INPUT if said.context else ALPACA_WITHOUT_INPUT
    prompt = form.format(instruction=said.instruction, input=said.context)
    return [Segment(prompt, False), Segment(said.answer, True)]
