"""Which columns of a row are what: the kind of a row, found by its columns' names.

    messages            messages: [{"role", "content"}, ...]        through the chat template
    sharegpt            conversations: [{"from", "value"}, ...]     through the chat template
    prompt/completion   two texts, taken as they stand; or two lists of messages
    alpaca              instruction (input) output                  through the chat template
    question/answer     one column of QUESTIONS and one of ANSWERS  through the chat template
    text                text, all of it trained

Beside them stand columns that change what a row means. They are used (system, history, context,
tools, documents, chat_template_kwargs) or, where lorax cannot, refused by name: never dropped in
silence. Any other column (id, source, ...) passes. No torch here: the recipe reads COLUMNS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lorax.data.conversation import Conversation, plain, read_turns
from lorax.data.rows import Row
from lorax.errors import DataError

Column = Literal[
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output",
    "question", "query", "problem", "response", "answer", "solution", "text",
    "context", "system", "history", "tools",
]  # fmt: skip
COLUMNS: tuple[str, ...] = get_args(Column)
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWERS = ("output", "response", "answer", "completion", "solution")
_TURNS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
_LAYOUT = {*_TURNS, *QUESTIONS, *ANSWERS, "text"}
_SYSTEM = ("system", "system_prompt", "system_message")
_CONTEXT = ("input", "context")
_FOR_TEMPLATES = ("tools", "documents")
_MEDIA = ("images", "image", "audios", "audio", "videos", "video")
_REFUSED = {  # other columns that change the meaning, and what to do
    "chosen": "preference rows are not trained on; keep the answer as completion",
    "rejected": "preference rows are not trained on; keep the answer as completion",
    "functions": "give them as tools",
}


@dataclass(frozen=True)
class Kind:
    """A kind of row: its name, and the columns that make it."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class PromptAndAnswer:
    """Two texts that are taken as they stand; prompt is empty in rows of plain text."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A question with one answer: in Stanford Alpaca's words where there is no chat template."""

    instruction: str
    context: str
    answer: str
    conversation: Conversation


def rename(rows: list[Row], columns: Mapping[Column, str] | None, path: object) -> list[Row]:
    """The rows with the recipe's names: `columns` goes from lorax's name to the file's.

    Where they make a row's kind, its other columns no longer can.

    Raises:
        DataError: a column that no row has.
    """
    if not columns:
        return rows
    for name, source in columns.items():
        if not any(source in values for values, _ in rows):
            found = ", ".join(sorted(rows[0][0]))
            raise DataError(
                f"{path}: data.columns.{name} = {source!r}: no row has such a column; expected "
                f"one of the first row's: {found}"
            )
    dropped = {*columns, *columns.values()}
    if _make_a_kind({*columns}):
        dropped |= _LAYOUT - set(_CONTEXT)
    return [
        (
            {key: value for key, value in values.items() if key not in dropped}
            | {name: values[source] for name, source in columns.items() if source in values},
            where,
        )
        for values, where in rows
    ]


def _make_a_kind(names: set[str]) -> bool:
    if names & {*_TURNS, "text"}:
        return True
    return not names.isdisjoint(QUESTIONS) and not names.isdisjoint(ANSWERS)


def find_kind(row: Row) -> Kind:
    """The kind of a row.

    Raises:
        DataError: its columns fit none, or more than one.
    """
    values, where = row
    there = [key for key, value in values.items() if value is not None]
    for column, name in _TURNS.items():
        if column in there:
            return Kind(name, (column,))
    if "prompt" in there and "completion" in there:
        return Kind("prompt/completion", ("prompt", "completion"))
    questions = [name for name in QUESTIONS if name in there]
    if len(questions) > 1 and "input" in questions:
        questions.remove("input")  # what the question is about
    answers = [name for name in ANSWERS if name in there]
    if questions and answers:
        for names in (questions, answers):
            if len(names) > 1:
                raise DataError(
                    f"{where}: columns {' and '.join(names)} could both be meant; say which with "
                    f"data.columns, such as {{ {names[0]} = {names[0]!r}, ... }}"
                )
        both = (questions[0], answers[0])
        return Kind("alpaca" if both == ("instruction", "output") else "/".join(both), both)
    if "text" in there:
        return Kind("text", ("text",))
    _refuse_by_name(row)
    raise DataError(
        f"{where}: columns {sorted(values)} fit no kind of row; expected messages, conversations, "
        "prompt and completion, instruction and output, question and answer, or text; "
        "data.columns in the recipe maps other names"
    )


def check_kind(row: Row, kind: Kind) -> None:
    """Refuse a row that is not of the kind that the file's first row is."""
    for column in kind.columns:
        if row[0].get(column) is None:
            _text(row, column)  # says what it is instead
    found = find_kind(row)
    if found != kind:
        raise DataError(
            f"{row[1]}: this row's columns make it {found.name}, the first row's {kind.name}; "
            "give the rows of each kind a file, or name the columns with data.columns"
        )


def read_row(
    row: Row, kind: Kind, ignores_context: bool = False
) -> Conversation | PromptAndAnswer | Question:
    """What a row says.

    ignores_context: a row of prompt and completion may have an input or context beside it, because
        the recipe names its columns.

    Raises:
        DataError: a column of the wrong type, or one that lorax cannot use, with file and line.
    """
    _refuse_what_cannot_be_used(row, kind)
    values, where = row
    if kind.name in _TURNS.values():
        (column,) = kind.columns
        _refuse_beside(row, kind, ("history",))
        messages, trained = read_turns(values[column], where, column)
        return _conversation(row, messages, trained)
    if kind.name == "prompt/completion":
        if isinstance(values["prompt"], list) and isinstance(values["completion"], list):
            return _prompt_and_completion_of_messages(row)
        others = () if ignores_context else _CONTEXT
        _refuse_beside(row, kind, (*others, *_SYSTEM, "history", *_FOR_TEMPLATES))
        return PromptAndAnswer(_text(row, "prompt"), _text(row, "completion"))
    if kind.name == "text":
        _refuse_beside(row, kind, (*_SYSTEM, "history", *_FOR_TEMPLATES))
        return PromptAndAnswer("", _text(row, "text"))
    return _question(row, kind)


def _question(row: Row, kind: Kind) -> Question:
    question, answer = (_text(row, column) for column in kind.columns)
    contexts = [
        _text(row, name) for name in _CONTEXT if row[0].get(name) and name not in kind.columns
    ]
    context = "\n\n".join(contexts)
    messages = _history(row)
    messages.append(
        {"role": "user", "content": f"{question}\n\n{context}" if context else question}
    )
    messages.append({"role": "assistant", "content": answer})
    trained = [message["role"] == "assistant" for message in messages]
    return Question(question, context, answer, _conversation(row, messages, trained))


def _history(row: Row) -> list[dict[str, Any]]:
    """LLaMA-Factory's earlier rounds: [[question, answer], ...]."""
    messages: list[dict[str, Any]] = []
    for pair in plain(row[0].get("history")) or []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(
                f"{row[1]}: history must be a list of question and answer"
                f", found {pair!r:.80}; mend the row, or remove it"
            )
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _prompt_and_completion_of_messages(row: Row) -> Conversation:
    """TRL's conversational form: only the completion is trained."""
    values, where = row
    prompt, _ = read_turns(values["prompt"], where, "prompt")
    completion, trained = read_turns(values["completion"], where, "completion")
    return _conversation(row, prompt + completion, [False] * len(prompt) + trained)


def _conversation(row: Row, messages: list[Any], trained: list[bool]) -> Conversation:
    """With the row's system text in front, and what else the template is to be given."""
    values, where = row
    system = [name for name in _SYSTEM if values.get(name)]
    if system:
        text = _text(row, system[0])
        if messages[0]["role"] == "system" and messages[0]["content"] != text:
            raise DataError(
                f"{where}: {system[0]} and the first message are two system texts; remove one"
            )
        if messages[0]["role"] != "system":
            messages, trained = [{"role": "system", "content": text}, *messages], [False, *trained]
    if not any(trained):
        raise DataError(
            f"{where}: no message of the assistant to learn, so there is nothing to train on"
            "; add one, or remove the row"
        )
    return Conversation(messages, trained, _variables(row))


def _variables(row: Row) -> dict[str, Any]:
    values, where = row
    variables: dict[str, Any] = {}
    for name in _FOR_TEMPLATES:
        value = plain(values.get(name))
        if value in (None, [], ""):
            continue
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise DataError(
                f"{where}: {name} must be a list of objects, found {str(value)[:80]}"
                "; mend the row, or remove it"
            )
        variables[name] = value
    others = plain(values.get("chat_template_kwargs"))
    if others:
        if not isinstance(others, dict):
            raise DataError(
                f"{where}: chat_template_kwargs must be an object"
                f", found {others!r:.80}; mend the row, or remove it"
            )
        variables |= others
    return variables


def _refuse_by_name(row: Row) -> None:
    values, where = row
    for name, advice in _REFUSED.items():
        if values.get(name):
            raise DataError(f"{where}: column {name}: {advice}")
    for name in _MEDIA:
        if values.get(name):
            raise DataError(f"{where}: column {name}: lorax trains on text only; remove the row")


def _refuse_what_cannot_be_used(row: Row, kind: Kind) -> None:
    _refuse_by_name(row)
    values, where = row
    label = values.get("label")
    if label is False or (kind.name != "text" and str(label).lower() in ("0", "false")):
        raise DataError(
            f"{where}: label is {label}: a bad answer, which lorax would train on; remove the row"
        )
    for name in ("weight", "train"):
        value = values.get(name)
        if value is not None and str(value).lower() not in ("1", "1.0", "true"):
            raise DataError(
                f"{where}: {name} of the row is {str(value)[:80]}: rows all count alike; remove "
                "the row or the column"
            )


def _refuse_beside(row: Row, kind: Kind, names: tuple[str, ...]) -> None:
    for name in names:
        if row[0].get(name) and name not in kind.columns:
            raise DataError(
                f"{row[1]}: column {name} has no place in a row of {kind.name}; write it into the "
                "messages or the text, or remove it"
            )


_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


def _text(row: Row, key: str) -> str:
    value: Any = row[0].get(key)
    if not isinstance(value, str):
        found = "missing" if key not in row[0] else _KINDS.get(type(value), "another kind of value")
        raise DataError(f"{row[1]}: {key} is {found}; expected a text; mend the row, or remove it")
    return value
