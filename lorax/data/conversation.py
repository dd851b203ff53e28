"""One form for all conversations: messages as a chat template reads them, and which are trained.

Turns come under many names; the left ones are read, the right ones are what a template sees:

    role | from                                              role
    content | value, text parts as a list                    content
    human; gpt, chatgpt, bing, bard, model; observation,     user; assistant; tool
    function_response; function_call (a JSON text)           assistant with tool_calls
    weight, train or loss of an answer: 0 or 1               Conversation.trained

What lorax does not know of a message goes to the template as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lorax.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_SWITCHES = ("weight", "train", "loss")  # OpenAI's, Axolotl's and ms-swift's name for the same
_KNOWN_PARTS = ("text",)


@dataclass(frozen=True)
class Conversation:
    """messages, whether each is trained, and what else the template is given (tools, ...)."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    variables: dict[str, Any] = field(default_factory=dict)


def read_turns(value: Any, where: str, name: str = "messages") -> tuple[list[Any], list[bool]]:
    """A list of turns as messages, and which are trained: the assistant's, unless they say not.

    Raises:
        DataError: no list, or a turn that cannot be used, with `where`.
    """
    turns = plain(value)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: {name} must be a list of role and content (or a list of from and value)"
            f", found {turns!r:.80}; mend the row, or remove it"
        )
    read = [_read_turn(turn, f"{where}: turn {n}") for n, turn in enumerate(turns, 1)]
    return [message for message, _ in read], [is_trained for _, is_trained in read]


def plain(value: Any) -> Any:
    """A value that data sets often keep as JSON text; other texts stay as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_turn(turn: Any, where: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(turn, dict):
        raise DataError(
            f"{where}: a message must have a role and a text as content: {_short(turn)}"
            "; mend the row, or remove it"
        )
    known = {key: value for key, value in turn.items() if value is not None}
    said = known.pop("role", None) or known.pop("from", None)
    role = _OTHER_NAMES.get(said, said) if isinstance(said, str) else None
    if role not in ROLES:
        raise DataError(
            f"{where}: a message must have a role ({', '.join(ROLES)}; or from human, gpt, "
            f"system, ...) and a text as content, found {_short(turn)}; mend the row, or remove it"
        )
    is_trained = _read_switches(known, role, where)
    content = known.pop("content", None)
    if content is None:
        content = known.pop("value", None)
    if "tool_calls" in known:
        known["tool_calls"] = plain(known["tool_calls"])
    if said == "function_call":
        known["tool_calls"], content = _read_calls(content, where), None
    if content is not None:
        _check_content(content, turn, where)
        known["content"] = content
    elif role != "assistant" or not (known.get("tool_calls") or known.get("function_call")):
        raise DataError(
            f"{where}: a message must have a text as content, found {_short(turn)}"
            "; mend the row, or remove it"
        )
    return {"role": role, **known}, is_trained


def _read_switches(message: dict[str, Any], role: str, where: str) -> bool:
    """Take weight, train and loss out of a message; is it trained?"""
    is_trained = role == "assistant"
    for name in _SWITCHES:
        value = message.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{where}: {name} is {_short(value)}; lorax takes 0 and 1 only; mend the row"
            )
        if value and role != "assistant":
            raise DataError(
                f"{where}: {name} asks to train a message of {role}; only the assistant's can be"
                "; set it to 0 there"
            )
        is_trained = is_trained and bool(value)
    return is_trained


def _check_content(content: Any, turn: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{where}: a message must have a text as content, found {_short(turn)}"
            "; mend the row, or remove it"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _KNOWN_PARTS:
            raise DataError(
                f"{where}: content has a part of type {kind}; lorax reads text only"
                "; remove the part, or the row"
            )
        if not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: content has a part without a text: {_short(part)}"
                "; mend the row, or remove it"
            )


def _read_calls(content: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's turn of function_call: one call or several, as JSON text."""
    calls = plain(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError(
            f"{where}: function_call must be JSON with a name: {_short(content)}"
            "; mend the row, or remove it"
        )
    return [{"type": "function", "function": call} for call in calls]


def join_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each list of text parts as one text."""
    return [
        {**m, "content": "".join(part["text"] for part in m["content"])}
        if isinstance(m.get("content"), list)
        else m
        for m in messages
    ]


def _short(value: Any) -> str:
    return str(value)[:80]
