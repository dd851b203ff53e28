"""A tokenizer with its special tokens and its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lorax.data.templates import ChatTemplate, Rendered, as_templates_see
from lorax.errors import FormatError, TemplateError, UsageError


class Tokenizer:
    """Text to token ids and back.

    backend: the `tokenizers.Tokenizer` that does the work.
    bos_token, eos_token, pad_token, unk_token: special tokens, or None.
    other_tokens: further special tokens by name, as "image_token"; templates may use them.
    extra_special_tokens: further ones without a name.
    chat_template: Jinja source, or None.
    named_templates: all chat templates by name; the one above is "default".
    end_token_ids: where generation stops; the eos token is always among them.
    files: the directory that it was read from, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        other_tokens: Mapping[str, str] | None = None,
        extra_special_tokens: Sequence[str] = (),
        chat_template: str | None = None,
        named_templates: Mapping[str, str] | None = None,
        end_token_ids: Sequence[int] = (),
        files: Path | None = None,
    ):
        self.backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.unk_token = unk_token
        self.other_tokens = dict(other_tokens or {})
        self.extra_special_tokens = list(extra_special_tokens)
        self.chat_template = chat_template
        self.named_templates = dict(named_templates or {})
        self.files = files
        eos = [] if self.eos_token_id is None else [self.eos_token_id]
        self.end_token_ids = tuple(dict.fromkeys([*eos, *end_token_ids]))

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the first token of a text, if there is one."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end token, if there is one."""
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        """What fills a batch's short rows: the pad token, else eos, else 0. It is always masked."""
        for token in (self.pad_token, self.eos_token):
            token_id = self._id(token)
            if token_id is not None:
                return token_id
        return 0

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that there are, by name: what templates may use."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        found = {name: getattr(self, name) for name in names} | self.other_tokens
        return {name: token for name, token in found.items() if token is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with what the tokenizer's own rules put around a text (often a bos token).

        A text that begins with the bos token already does not get a second one.

        Raises:
            UsageError: the text holds half of a surrogate pair, which is no character, or Code
                Llama's fill token, which is a place and no token.
            FormatError: the tokenizer's own rules fail on this text.
        """
        fill = self.other_tokens.get("fill_token")
        if fill is not None and fill in text:
            raise UsageError(
                f"{fill} stands for what is to be filled in; expected the tokens that the model "
                "reads; write '\u2581<PRE> BEFORE\u2581<SUF> BEHIND\u2581<MID>'"
            )
        try:
            with _panics_as_errors():
                ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # the library's word for a text that UTF-8 cannot write
            raise UsageError(
                "a text with half of a surrogate pair cannot be encoded"
                "; remove the half from the text"
            ) from None
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text behind token ids."""
        with _panics_as_errors():
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def prefix(self) -> list[int]:
        """What stands before every text: [bos] or nothing."""
        with _panics_as_errors():
            ids = self.backend.encode("a", add_special_tokens=True).ids
        return ids[:1] if self.bos_token_id is not None and ids[:1] == [self.bos_token_id] else []

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as one text, special tokens spelled out.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt: end with the words that open the assistant's next answer.
            variables: what else the template reads: tools, documents, enable_thinking, ...

        Raises:
            TemplateError: there is no template, it fails, or it leaves its bounds.
        """
        return self.render_chat(messages, add_generation_prompt, **variables).text

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """As `apply_chat_template`, with the places that `{% generation %}` marks."""
        if self.chat_template is None:
            raise TemplateError(
                "this tokenizer has no chat template; use prompts and completions, or a model "
                "that was tuned for chat"
            )
        given = dict(self.special_tokens)  # those that are set, as transformers gives them
        given |= variables | {
            "messages": as_templates_see(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        source = self.chat_template
        if variables.get("tools"):  # a template of its own for tools, as transformers picks it
            source = self.named_templates.get("tool_use", source)
        return ChatTemplate(source).render(**given)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """An expression of tokenizer.json that goes around without end is given up by Oniguruma.

    Rust reports that as a panic, which Python sees as no Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(
            f"tokenizer: its own rules fail on this text ({error}); get its files anew, or take "
            "another tokenizer"
        ) from None
