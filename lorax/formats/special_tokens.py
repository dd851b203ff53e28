"""Special tokens, from all the places where a tokenizer's directory may name them.

    tokenizer_config.json     bos_token, eos_token ...: a text, or a written-out AddedToken
                              added_tokens_decoder: id -> AddedToken (transformers 4.34 to 4.x)
                              extra_special_tokens, additional_special_tokens: a list, or by name
    special_tokens_map.json   the same names (before 4.34); it wins where it is read
    added_tokens.json         token -> id, of the oldest repositories
    tokenizer.json            added_tokens

The two files in the middle count only where there is no `added_tokens_decoder`. What is named, and
is in no vocabulary, becomes a new token behind it. All of this is as in transformers 5.23's
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`, the order of the new
tokens (and so their ids) included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lorax.errors import FormatError
from lorax.formats.json_files import read_json

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA = "extra_special_tokens"
_ADDITIONAL = "additional_special_tokens"  # its name before transformers 5

Token = str | AddedToken


@dataclass
class SpecialTokens:
    """What the files name.

    named: by attribute ("bos_token" ...; a model's own, as "image_token", behind them); None where
        a file says null.
    extra: further special tokens.
    states_extra: whether a config has any of these.
    added: tokens beside or behind the vocabulary, by id.
    """

    named: dict[str, Token | None]
    extra: list[Token]
    added: dict[int, AddedToken]
    states_extra: bool

    def text(self, name: str) -> str | None:
        """A named token as a text."""
        token = self.named.get(name)
        return None if token is None else str(token)


def read_special_tokens(
    directory: Path,
    config: Mapping[str, Any],
    listed: Sequence[Any] = (),
    pieces: Sequence[AddedToken] | None = None,
) -> SpecialTokens:
    """Gather them.

    Args:
        directory: the tokenizer's.
        config: its tokenizer_config.json.
        listed: `added_tokens` of its tokenizer.json.
        pieces: of its tokenizer.model, the special tokens; they are extra ones, unless the config
            has some.

    Raises:
        FormatError: a file is damaged, or a value is no token.
    """
    where = str(directory / "tokenizer_config.json")
    values = dict(config)
    if _ADDITIONAL in values and not values.get(_EXTRA):
        values[_EXTRA] = values.pop(_ADDITIONAL)
    own = {key: values.pop(key) for key in [*values] if _is_own(key) and type(values[key]) is str}
    own |= _by_name(values)
    if values.get("added_tokens_decoder") is not None:
        added = _numbered(values["added_tokens_decoder"], where)
    else:
        _take_map(values, directory / "special_tokens_map.json")
        own |= _by_name(values)
        added = _old_added(values, directory / "added_tokens.json")
        listing = {row.get("id"): row for row in listed if isinstance(row, dict)}
        added |= _numbered(listing, str(directory / "tokenizer.json"))
    known = {token.content: token for token in added.values()}
    named: dict[str, Token | None] = {}
    for key in NAMES:
        if key in values:
            token = _token(values[key], f"{where}: {key}")
            named[key] = known.get(str(token), token) if token is not None else None
    for key, value in [*((k, values[k]) for k in values if _is_own(k)), *own.items()]:
        if isinstance(value, str | dict):
            named[key] = _token(value, f"{where}: {key}")
        elif value is None:  # the class's own is not wanted
            named[key] = None
    if _EXTRA not in values and pieces is not None:
        return SpecialTokens(named, list(pieces), added, False)
    extra = _token_list(values.get(_EXTRA, values.get(_ADDITIONAL)), f"{where}: {_EXTRA}")
    return SpecialTokens(named, extra, added, bool(extra))


def complete(
    special: SpecialTokens, defaults: Mapping[str, str | None], extra: Sequence[str] = ()
) -> None:
    """Fill in a class's own special tokens, and put all in transformers' order.

    extra: names of those that are extra ones as well, where no config has any.
    """
    named = {**defaults, **special.named}
    special.named = {key: named[key] for key in (*NAMES, *named) if key in named}
    if not special.states_extra:
        special.extra += [token for token in map(named.get, extra) if token is not None]


def add_special_tokens(backend: Backend, special: SpecialTokens) -> None:
    """Give the backend the tokens that it lacks."""
    present = backend.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    new: list[Token] = [t for _, t in sorted(special.added.items()) if repr(t) not in same]
    known = {token.content for token in present} | {str(token) for token in new}
    names = {str(token) for token in special.named.values() if token}
    for token in [*special.named.values(), *special.extra]:
        if token is not None and str(token) not in known:
            new.append(token)
            known.add(str(token))
    backend.add_tokens([_as_special(token, names) for token in new])


def _as_special(token: Token, names: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if token.content in names:
        token.special = True
    return token


def _is_own(key: str) -> bool:
    """Whether a key names a token of the model's own, as "image_token"."""
    return key.endswith("_token") and key not in NAMES


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    """Extra special tokens that stand under names; they are taken out of `values`."""
    return values.pop(_EXTRA) if isinstance(values.get(_EXTRA), dict) else {}


def _take_map(values: dict[str, Any], path: Path) -> None:
    """Lay special_tokens_map.json over the config's values; lists of extra tokens are joined."""
    found = read_json(path, constants=True) if path.is_file() else {}
    for key, value in found.items():
        if isinstance(value, list):
            first = values.get(key) if key == _EXTRA else None
            value = [*(first if isinstance(first, list) else []), *map(_marked, value)]
        elif key != _EXTRA:
            value = _marked(value)
        values[key] = value


def _marked(value: Any) -> Any:
    """A written-out token, special: the map has no others, and does not say so."""
    return {**value, "special": True} if isinstance(value, dict) else value


def _old_added(values: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """added_tokens.json: token -> id."""
    if not path.is_file():
        return {}
    extra = values.get(_EXTRA)
    given = [values.get(key) for key in NAMES] + (extra if isinstance(extra, list) else [])
    names = {token.get("content") if isinstance(token, dict) else token for token in given if token}
    found = {}
    for content, number in read_json(path, constants=True).items():
        special = content in names
        token = AddedToken(content, normalized=not special, special=special)
        found[_id(number, str(path))] = token
    return found


def _numbered(found: Any, where: str) -> dict[int, AddedToken]:
    """{id: a written-out AddedToken}; JSON has ids as texts where they are keys."""
    if not isinstance(found, dict):
        raise FormatError(
            f"{where}: added_tokens_decoder must be an object; "
            "mend it there, or save the tokenizer again with transformers"
        )
    result = {}
    for number, value in found.items():
        token = _token(value, where) if isinstance(value, dict) else None
        if not isinstance(token, AddedToken):
            raise FormatError(
                f"{where}: {value!r} is no added token; expected an object with a text as content"
            )
        result[_id(number, where)] = token
    return result


def _id(value: Any, where: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        return int(value)
    if isinstance(value, int) and value >= 0:
        return value
    raise FormatError(f"{where}: {value!r} is no token id; expected a whole number from 0 on")


def _token_list(found: Any, where: str) -> list[Token]:
    if found is None:
        return []
    if not isinstance(found, list):
        raise FormatError(
            f"{where}: {found!r} is no list of tokens; "
            "mend it there, or save the tokenizer again with transformers"
        )
    tokens = [_token(value, where) for value in found]
    return [token for token in tokens if token is not None]


def _token(value: Any, where: str) -> Token | None:
    """A text, or a written-out AddedToken with the flags that are given."""
    if isinstance(value, dict):
        content = value.get("content")
        if isinstance(content, str):
            flags = {key: value[key] for key in _FLAGS if isinstance(value.get(key), bool)}
            return AddedToken(content, **flags)
    elif value is None or isinstance(value, str):
        return value
    raise FormatError(
        f"{where}: {value!r} is no token; expected a text, or an object with a text as content"
    )
