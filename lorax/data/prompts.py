"""The prompts of a file: rows in the forms that training reads, whose answer is still missing.

    {"prompt": "..."}                           put through the chat template as a user's message
    {"prompt": [...]}, {"messages": [...]}      a conversation that ends with what is to be answered
    {"conversations": [...]}                    the same in ShareGPT's words
    {"instruction": ..., "input": ...}          and the other names of questions

A column with an answer is passed over, so a file of training does too. system, history, tools and
what else changes a row's meaning count as in training (kinds.py); each error names file and line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax.data.conversation import plain
from lorax.data.examples import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from lorax.data.kinds import ANSWERS, QUESTIONS, PromptAndAnswer, Question, find_kind, read_row
from lorax.data.rows import Row, read_rows
from lorax.data.tokenizer import Tokenizer
from lorax.errors import DataError, TemplateError, UsageError

_TURNS = ("messages", "conversations", "conversation")
_NO_ANSWER = {"role": "assistant", "content": ""}


@dataclass(frozen=True)
class Prompt:
    """Its tokens, where it stands, and the row's own words for it: prompt or messages."""

    ids: list[int]
    where: str
    said: dict[str, Any]


def read_prompts(path: Path, tokenizer: Tokenizer, raw: bool = False) -> list[Prompt]:
    """All prompts of a jsonl, json, csv or parquet file, encoded.

    raw: no chat template: each prompt must be one text, and is taken as it stands.

    Raises:
        DataError: the file or a row of it cannot be used, with file and line.
    """
    found = []
    for row in read_rows(path):
        try:
            found.append(_read(row, tokenizer, raw))
        except (TemplateError, UsageError) as error:
            raise DataError(f"{row[1]}: {error}") from None
    return found


def encode_prompt(text: str, tokenizer: Tokenizer, raw: bool = False) -> list[int]:
    """A text as a user's message through the chat template; as it stands if `raw`, or without one.

    Raises:
        TemplateError: the template fails. UsageError: the text cannot be encoded.
    """
    if raw or tokenizer.chat_template is None:
        return tokenizer.encode(text)
    return encode_conversation([{"role": "user", "content": text}], {}, tokenizer)


def _read(row: Row, tokenizer: Tokenizer, raw: bool) -> Prompt:
    asked = _with_empty_answer(row)
    said = read_row(asked, find_kind(asked))
    assert not isinstance(said, PromptAndAnswer)
    talk = said.conversation if isinstance(said, Question) else said
    messages = talk.messages[:-1]
    is_text = isinstance(said, Question) and len(messages) == 1 and not talk.variables
    shown = {"prompt": messages[0]["content"]} if is_text else {"messages": messages}
    if tokenizer.chat_template is not None and not raw:
        return Prompt(encode_conversation(messages, talk.variables, tokenizer), row[1], shown)
    if not is_text:
        raise DataError(
            f"{row[1]}: a conversation, system text or tools need a chat template"
            "; leave out --raw, choose a model with a template, or give one text as prompt"
        )
    assert isinstance(said, Question)
    return Prompt(tokenizer.encode(_as_it_stands(row, said, raw)), row[1], shown)


def _with_empty_answer(row: Row) -> Row:
    """The row as one of training, whose answer is empty."""
    values, where = row
    asked = {k: v for k, v in values.items() if k not in ANSWERS and v is not None}
    turns = [name for name in (*_TURNS, "prompt") if isinstance(plain(asked.get(name)), list)]
    if turns:
        messages = plain(asked.pop(turns[0]))
        if not messages:
            raise DataError(
                f"{where}: {turns[0]} is empty; expected what is to be answered; add it"
            )
        last = messages[-1] if isinstance(messages[-1], dict) else {}
        if last.get("role", last.get("from")) in ("assistant", "gpt", "model"):
            raise DataError(
                f"{where}: the last message is the assistant's; expected one that is to be "
                "answered; remove the answer"
            )
        return {**asked, "messages": [*messages, _NO_ANSWER]}, where
    if not any(name in asked for name in (*_TURNS, *QUESTIONS)):
        raise DataError(
            f"{where}: columns {sorted(values)} hold no prompt; expected prompt, messages, "
            "conversations, instruction or question; rename the column"
        )
    return {**asked, "answer": ""}, where


def _as_it_stands(row: Row, said: Question, raw: bool) -> str:
    """Of a prompt its text; of an instruction Stanford Alpaca's words, as in training."""
    if raw or "prompt" in row[0]:
        content = said.conversation.messages[0]["content"]
        assert isinstance(content, str)
        return content
    form = ALPACA_WITH_INPUT if said.context else ALPACA_WITHOUT_INPUT
    return form.format(instruction=said.instruction, input=said.context)


def encode_conversation(
    messages: list[dict[str, Any]], variables: dict[str, Any], tokenizer: Tokenizer
) -> list[int]:
    """A conversation that is to be answered, through the chat template.

    Raises:
        TemplateError: there is none, or it fails. UsageError: the text cannot be encoded.
    """
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **variables)
    return tokenizer.encode(text, add_special_tokens=False)
