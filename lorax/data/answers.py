"""Where the answers stand in a rendered conversation.

A chat template is a program; where it puts a message's text only its output can say. So each text
goes in between two marks that nobody can guess, and the conversation is rendered once:

    <|user|>(o0)river(c0)<|end|><|assistant|><think></think>(o1)stone(c1)<|end|><|user|>...
                         '------------------' what generation is given: behind it the answer begins
                                             '--------------------------' the answer
                                                                         '---------' the next header

An answer begins behind the prompt that generation would have been given, and ends with the end
token that the template writes behind it. Taking the marks out must give the plain rendering, or
they have changed what the template does. Marks stand inside surrounding space (templates trim) and
around each piece between tags that the template splits at ("</think>"): what it leaves out goes
with its marks. Where all this fails, answers are what the text gains by a message, if it grows.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorax.data.conversation import Conversation, join_parts
from lorax.data.templates import REASONING, Rendered
from lorax.data.tokenizer import Tokenizer
from lorax.errors import TemplateError

Span = tuple[int, int]  # [start, end) in characters
_SECRET = "m" + secrets.token_hex(8)  # letters and digits only: JSON leaves them as they are
_MARK = re.compile(_SECRET + r"([oc])(\d+)z")
_TAG = re.compile(r"(<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\])")
_OPENED = re.compile(r"[<\[][^<>\[\]\s]*$")  # the first half of a tag
_PROBE = [{"role": "user", "content": "What?"}]


def find_answers(talk: Conversation, tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The rendered conversation, and where the answers that are trained stand in it.

    Where the template marks the assistant's words itself (`{% generation %}`), its marks count.

    Raises:
        TemplateError: the template fails, leaves out a message or the tools, or changes an answer
            so that its place cannot be found.
    """
    talk, whole = _render_plainly(talk, tokenizer)
    _check_variables(talk, whole, tokenizer)
    marked = _Marked.render(talk, whole.text, tokenizer)
    if marked is not None:
        marked.check_that_all_is_there()
    answers = [n for n, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if whole.spans and all(talk.trained[n] for n in answers):
        return whole.text[: whole.spans[-1][1]], list(whole.spans)
    if marked is not None and all(marked.stands_together(n) for n in answers):
        found = {n: marked.span(n) for n in answers}
    else:
        found = _spans_by_growth(talk, whole.text, tokenizer)
    if whole.spans:
        left_out = [span for n, span in found.items() if not talk.trained[n]]
        spans = [
            span
            for span in whole.spans
            if not any(span[0] < end and start < span[1] for start, end in left_out)
        ]
        return whole.text[: whole.spans[-1][1]], spans
    return whole.text, [span for n, span in found.items() if talk.trained[n]]


def _render_plainly(talk: Conversation, tokenizer: Tokenizer) -> tuple[Conversation, Rendered]:
    """Text parts as a list for a template that reads them, else as one text."""
    lists = [m["content"] for m in talk.messages if isinstance(m.get("content"), list)]
    if lists:
        try:
            whole = tokenizer.render_chat(talk.messages, **talk.variables)
        except TemplateError:
            pass
        else:
            texts = [part["text"].strip() for parts in lists for part in parts]
            printed = [form for parts in lists for form in (str(parts), json.dumps(parts))]
            if all(t in whole.text for t in texts) and not any(p in whole.text for p in printed):
                return talk, whole
        talk = Conversation(join_parts(talk.messages), talk.trained, talk.variables)
    return talk, tokenizer.render_chat(talk.messages, **talk.variables)


def _check_variables(talk: Conversation, whole: Rendered, tokenizer: Tokenizer) -> None:
    """The row's tools and documents must show in what the model reads."""
    for name in ("tools", "documents"):
        if name in talk.variables:
            others = {key: value for key, value in talk.variables.items() if key != name}
            if tokenizer.render_chat(talk.messages, **others).text == whole.text:
                raise TemplateError(
                    f"chat template: does not print the row's {name}, so the model would learn "
                    "answers to what it is not shown"
                    "; remove it from the rows, or use a template that prints it"
                )


@dataclass(frozen=True)
class _Mark:
    position: int  # in the text without marks
    message: int


class _Marked:
    """A rendering with marks: its plain text, and the marks in the order in which they stand."""

    def __init__(
        self, talk: Conversation, messages: list[Any], placed: set[int], tokenizer: Tokenizer
    ):
        self.talk = talk
        self.messages = messages
        self.placed = placed  # messages that have a text to mark
        self.tokenizer = tokenizer
        self.text = ""
        self.marks: list[_Mark] = []
        self.places: dict[int, list[int]] = {}  # a message's marks, by their index
        self._prompts: dict[str, str | None] = {}
        self._tails: dict[tuple[str, bool], str] = {}
        self._known_header: str | None = None
        ends = (tokenizer.decode([token]) for token in tokenizer.end_token_ids)
        self.end_texts = [text for text in ends if text]

    @classmethod
    def render(cls, talk: Conversation, whole: str, tokenizer: Tokenizer) -> _Marked | None:
        """None where the marks change what the template writes."""
        source = tokenizer.chat_template or ""
        messages = [_mark_message(m, n, source) for n, m in enumerate(talk.messages)]
        placed = {n for n, message in enumerate(messages) if message != talk.messages[n]}
        marked = cls(talk, messages, placed, tokenizer)
        seen = marked._try(messages)
        if seen is None or seen[0] != whole:
            return None
        marked.text, marked.marks = seen
        for k, mark in enumerate(marked.marks):
            marked.places.setdefault(mark.message, []).append(k)
        return marked

    def _try(
        self, messages: Sequence[Any], add_generation_prompt: bool = False
    ) -> tuple[str, list[_Mark]] | None:
        """Text and marks of a rendering, or None where the template refuses these messages."""
        try:
            rendered = self.tokenizer.render_chat(
                messages, add_generation_prompt, **self.talk.variables
            )
        except TemplateError:
            return None
        return _read_marks(rendered.text)

    def check_that_all_is_there(self) -> None:
        """Refuse a template that leaves out a message: the row would mean something else."""
        missing = self.placed - self.places.keys()
        if missing:
            n = min(missing)
            raise TemplateError(
                f"chat template: leaves out message {n + 1} (of {self.messages[n]['role']}), so "
                "the row would lose it; remove the message, or use a template that writes it"
            )

    def stands_together(self, n: int) -> bool:
        """Do a message's marks stand once, and side by side?"""
        places = self.places.get(n)
        return places is not None and len(places) == places[-1] - places[0] + 1

    def span(self, n: int) -> Span:
        """From behind the generation prompt through the end token."""
        places = self.places[n]
        before, behind = places[0] - 1, places[-1] + 1
        left = self.marks[before].position if before >= 0 else 0
        right = self.marks[behind].position if behind < len(self.marks) else len(self.text)
        opens, closes = self.marks[places[0]].position, self.marks[places[-1]].position
        follows = before >= 0 and self.marks[before].message == n - 1
        start = left + self._prompt_length(n, self.text[left:opens], follows)
        return start, closes + self._tail_length(n, self.text[closes:right])

    def _prompt_length(self, n: int, between: str, follows: bool) -> int:
        """How much of what stands before an answer's text was given to generation."""
        prompt = self._prompt(n) if follows else None
        if prompt is not None:
            common = _common(prompt, between)
            if common == len(prompt) or not between[common:].strip():
                return common
        header = self._header()
        place = between.rfind(header) if header else -1
        return place + len(header) if place >= 0 else len(between)

    def _prompt(self, n: int) -> str | None:
        """What generation is given behind the text of the message before answer n.

        It is rendered once for each role that an answer follows: more would take a time that is
        quadratic in the turns.
        """
        role = self.messages[n - 1]["role"]
        if role not in self._prompts:
            seen = self._try(self.messages[:n], add_generation_prompt=True)
            is_last = seen is not None and seen[1] and seen[1][-1].message == n - 1
            self._prompts[role] = seen[0][seen[1][-1].position :] if seen and is_last else None
        return self._prompts[role]

    def _header(self) -> str:
        """What a generation prompt adds to a conversation; empty where that cannot be told."""
        if self._known_header is None:
            roles = [message["role"] for message in self.messages]
            first = next((n for n, role in enumerate(roles) if n and role == "assistant"), 0)
            prefix = self.messages[:first] or _PROBE
            given, plain = self._try(prefix, True), self._try(prefix)
            self._known_header = ""
            if given is not None and plain is not None:
                common = _common(given[0], plain[0])
                self._known_header = given[0][_whole_tags(given[0], common) :]
        return self._known_header

    def _tail_length(self, n: int, rest: str) -> int:
        """How much of what stands behind an answer's text belongs to the answer."""
        ends = [rest.find(text) + len(text) for text in self.end_texts if text in rest]
        if ends:
            return min(ends)
        is_last = n + 1 == len(self.messages)
        key = ("" if is_last else self.messages[n + 1]["role"], "tool_calls" in self.messages[n])
        known = self._tails.get(key)
        if known is None or not rest.startswith(known):
            known = self._tails[key] = self._tail(n, rest, is_last)
        return len(known)

    def _tail(self, n: int, rest: str, is_last: bool) -> str:
        """What is written behind an answer whatever follows it: a question, or nothing."""
        others = [*self.messages, *_PROBE] if is_last else self.messages[: n + 1]
        seen = self._try(others)
        places = [mark.position for mark in seen[1] if mark.message == n] if seen else []
        if seen is None or not places:
            return rest if is_last else ""
        other = seen[0][places[-1] :]
        common = _common(rest, other)
        if common in (len(rest), len(other)):
            return rest[:common]
        return rest[: _whole_tags(rest, common)]


def _spans_by_growth(talk: Conversation, whole: str, tokenizer: Tokenizer) -> dict[int, Span]:
    """Each answer is what the text gains when it is added to the messages before it."""
    found = {}
    for n, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(talk.messages[:n], True, **talk.variables)
        after = tokenizer.apply_chat_template(talk.messages[: n + 1], **talk.variables)
        is_there = str(message.get("content", "")).strip()[-12:] in after[len(before) :]
        if not (is_there and after.startswith(before) and whole.startswith(after)):
            raise TemplateError(
                f"chat template: message {n + 1} is rewritten or changes what stands before "
                "it, so the answer's place cannot be found; use a template that marks it "
                "with {% generation %}"
            )
        found[n] = (len(before), len(after))
    return found


def _mark_message(message: dict[str, Any], n: int, source: str) -> dict[str, Any]:
    """The message with marks around its texts and the names of the tools that it calls."""
    marked = dict(message)
    for key in ("content", *REASONING):
        value = message.get(key)
        if isinstance(value, str):
            marked[key] = _mark_text(value, n, source)
        elif isinstance(value, list):
            marked[key] = [{**part, "text": _mark_text(part["text"], n, source)} for part in value]
    if isinstance(message.get("tool_calls"), list):
        marked["tool_calls"] = [_mark_call(call, n) for call in message["tool_calls"]]
    if isinstance(message.get("function_call"), dict):
        marked["function_call"] = _mark_call(message["function_call"], n)
    return marked


def _mark_call(call: Any, n: int) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _mark_call(call["function"], n)}
    return {**call, "name": _mark_text(call["name"], n, "")} if "name" in call else call


def _mark_text(text: Any, n: int, source: str) -> Any:
    """Marks around each piece between tags that stand in the template's source too."""
    if not isinstance(text, str):
        return text
    pieces = [""]
    for k, piece in enumerate(_TAG.split(text)):
        if k % 2 and piece in source:
            pieces += [piece, ""]
        else:
            pieces[-1] += piece
    return "".join(piece if k % 2 else _mark_piece(piece, n) for k, piece in enumerate(pieces))


def _mark_piece(piece: str, n: int) -> str:
    core = piece.strip()
    if not core:
        return piece
    start = piece.index(core)
    behind = piece[start + len(core) :]
    return f"{piece[:start]}{_SECRET}o{n}z{core}{_SECRET}c{n}z{behind}"


def _read_marks(text: str) -> tuple[str, list[_Mark]]:
    """The text without marks, and where they stood."""
    pieces, marks, length, end = [], [], 0, 0
    for found in _MARK.finditer(text):
        pieces.append(text[end : found.start()])
        length += len(pieces[-1])
        marks.append(_Mark(length, int(found[2])))
        end = found.end()
    return "".join([*pieces, text[end:]]), marks


def _common(one: str, other: str) -> int:
    """How many first characters two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _whole_tags(text: str, length: int) -> int:
    """`length`, or less where it would cut a tag in two ("<|us" of "<|user|>")."""
    half = _OPENED.search(text[:length])
    return half.start() if half else length
