"""From a row to token ids with a loss mask.

Five kinds of rows are told apart by their keys, from the first row of the file:

    messages            {"messages": [{"role", "content"}, ...]}
    sharegpt            {"conversations": [{"from", "value"}, ...]}
    prompt/completion   {"prompt", "completion"}
    alpaca              {"instruction", "input" (may be missing), "output"}
    text                {"text"}

A row becomes segments of text, each trained or not, whose tokens are put behind each other. So the
mask goes by position. It never asks whether a token looks like padding or like an answer, and so
the end token is learned even where it is the pad token too. Cutting at the seams also shows the
model the very tokens that it will meet when it generates: the prompt's own, never one that the
tokenizer has merged across the seam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLES = ("system", "user", "assistant", "tool")


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


def load_examples(path: Path, tokenizer: Tokenizer, max_length: int) -> Examples:
    """Read a file, find out its kind, encode its rows.

    A row longer than `max_length` tokens is cut there; one that then has nothing to train on is
    dropped. Both are counted.

    Raises:
        DataError: the file or a row of it cannot be used, with file and line.
    """
    rows = read_rows(path)
    kind = find_kind(rows[0])
    examples, truncated = [], 0
    for row in rows:
        try:
            example = encode(_segments(kind, row, tokenizer), tokenizer)
        except UsageError as error:
            raise DataError(f"{row[1]}: {error}") from None
        if len(example.ids) > max_length:
            truncated += 1
            example = Example(example.ids[:max_length], example.trained[:max_length])
        if example.tokens:
            examples.append(example)
    if not examples:
        raise DataError(f"{path}: no row has anything to train on within {max_length} tokens")
    return Examples(examples, kind, truncated, len(rows) - len(examples))


def find_kind(row: Row) -> str:
    """The kind of a row, by its keys."""
    keys = set(row[0])
    for kind, (needed, _) in _KINDS.items():
        if needed <= keys:
            return kind
    expected = "; ".join(" and ".join(sorted(needed)) for needed, _ in _KINDS.values())
    raise DataError(f"{row[1]}: keys {sorted(keys)} fit no kind of row; expected {expected}")


def encode(segments: list[Segment], tokenizer: Tokenizer) -> Example:
    """Encode segments behind each other.

    A segment's tokens are what the text gains by it (Llama 2's tokenizer puts a space before each
    text, and an answer is no text of its own); where that changes a token before the seam, the
    tokens of the segment alone.
    """
    ids: list[int] = []
    trained: list[bool] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
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
        if segment.trained and not segment.is_rendered and part[-1:] != end:
            part += end
        answer = _through_end(part, tokenizer) if segment.trained else 0
        ids += part
        trained += [True] * answer + [False] * (len(part) - answer)
    if not segments[0].is_rendered and ids[:1] != tokenizer.prefix:
        ids = tokenizer.prefix + ids
        trained = [False] * len(tokenizer.prefix) + trained
    return Example(ids, trained)


def _through_end(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of an answer's tokens are trained: through the last end token, if it has one."""
    for index in reversed(range(len(ids))):
        if ids[index] in tokenizer.end_token_ids:
            return index + 1
    return len(ids)


def _segments(kind: str, row: Row, tokenizer: Tokenizer) -> list[Segment]:
    return _KINDS[kind][1](row, tokenizer)


def _messages(row: Row, tokenizer: Tokenizer) -> list[Segment]:
    messages = row[0].get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row[1]}: messages must be a list of role and content")
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"{row[1]}: a message must have a role ({', '.join(_ROLES)}) and a text as "
                f"content, found {str(message)[:80]}"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row[1]}: no message of the assistant, so there is nothing to train on")
    try:
        return chat_segments(messages, tokenizer)
    except TemplateError as error:
        raise DataError(f"{row[1]}: {error}") from None


def chat_segments(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[Segment]:
    """Cut a rendered conversation into what the assistant says and the rest.

    Where the template marks the assistant's words itself, its marks count. Else each answer is
    what the text gains when it is added to the messages before it and their generation prompt.
    """
    whole = tokenizer.render_chat(messages)
    spans = list(whole.spans) or _answer_spans(messages, whole.text, tokenizer)
    segments, position = [], 0
    for start, end in spans:
        segments.append(Segment(whole.text[position:start], False, is_rendered=True))
        segments.append(Segment(whole.text[start:end], True, is_rendered=True))
        position = end
    return segments


def _answer_spans(
    messages: list[dict[str, str]], whole: str, tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1])
        if not after.startswith(before) or not whole.startswith(after):
            raise TemplateError(
                f"chat template: message {index + 1} changes what stands before it, so the "
                "answer's place cannot be found; a template with {% generation %} marks it"
            )
        spans.append((len(before), len(after)))
    return spans


def _sharegpt(row: Row, tokenizer: Tokenizer) -> list[Segment]:
    turns = row[0].get("conversations")
    if not isinstance(turns, list):
        raise DataError(f"{row[1]}: conversations must be a list of from and value")
    messages = []
    for turn in turns:
        role = _SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None:
            raise DataError(f"{row[1]}: a turn must be from human, gpt or system: {str(turn)[:80]}")
        messages.append({"role": role, "content": turn.get("value")})
    return _messages(({"messages": messages}, row[1]), tokenizer)


def _prompt_completion(row: Row, _: Tokenizer) -> list[Segment]:
    return [Segment(_text(row, "prompt"), False), Segment(_text(row, "completion"), True)]


def _alpaca(row: Row, tokenizer: Tokenizer) -> list[Segment]:
    """Through the model's chat template if it has one, else in Stanford Alpaca's words."""
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = _text(row, "input") if row[0].get("input") else ""
    if tokenizer.chat_template is not None:
        question = f"{instruction}\n\n{context}" if context else instruction
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": output},
        ]
        return _messages(({"messages": messages}, row[1]), tokenizer)
    form = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    prompt = form.format(instruction=instruction, input=context)
    return [Segment(prompt, False), Segment(output, True)]


def _plain_text(row: Row, _: Tokenizer) -> list[Segment]:
    return [Segment(_text(row, "text"), True)]


def _text(row: Row, key: str) -> str:
    value: Any = row[0].get(key)
    if not isinstance(value, str):
        found = "missing" if key not in row[0] else f"a {type(value).__name__}"
        raise DataError(f"{row[1]}: {key} is {found}; expected a text")
    return value


_Reader = Callable[[Row, Tokenizer], list[Segment]]
_KINDS: dict[str, tuple[set[str], _Reader]] = {
    "messages": ({"messages"}, _messages),
    "sharegpt": ({"conversations"}, _sharegpt),
    "prompt/completion": ({"prompt", "completion"}, _prompt_completion),
    "alpaca": ({"instruction", "output"}, _alpaca),
    "text": ({"text"}, _plain_text),
}
