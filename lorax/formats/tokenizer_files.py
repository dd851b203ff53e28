"""tokenizer.json and what lies beside it: special tokens, chat template, end tokens."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from lorax.data.tokenizer import Tokenizer
from lorax.errors import FormatError
from lorax.formats.json_files import read_json

MAX_TEMPLATE_BYTES = 2**20


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read a tokenizer directory.

    Raises:
        FormatError: tokenizer.json is missing or damaged, or a file beside it is.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FormatError(f"{directory}: no tokenizer.json; lorax reads no other tokenizer file")
    read_json(path)  # sizes, duplicate keys: the library below would take them
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exceptions, and Rust panics, which are no Exceptions
        raise FormatError(f"{path}: not a readable tokenizer ({error})") from None
    config = _optional_json(directory / "tokenizer_config.json")
    tokens = {key: _token(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    for key, token in tokens.items():
        if token is not None and backend.token_to_id(token) is None:
            raise FormatError(f"{directory}: {key} {token!r} is not in tokenizer.json")
    return Tokenizer(
        backend,
        **tokens,
        chat_template=_chat_template(directory, config),
        end_token_ids=_end_token_ids(directory),
    )


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a directory."""
    (directory / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for key in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, key) is not None:
            config[key] = getattr(tokenizer, key)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template)
    if tokenizer.end_token_ids:
        generation = {"eos_token_id": list(tokenizer.end_token_ids)}
        text = json.dumps(generation, indent=2) + "\n"
        (directory / "generation_config.json").write_text(text)


def read_template(directory: Path) -> str | None:
    """The chat template in a directory, whether or not a tokenizer lies there."""
    return _chat_template(directory, _optional_json(directory / "tokenizer_config.json"))


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise FormatError(f"{path}: more than {MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not UTF-8 ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; the one for plain chat is "default"
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{directory}: chat_template in tokenizer_config.json is no text")
    return template


def _end_token_ids(directory: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: a number, a list or nothing."""
    for file in ("generation_config.json", "config.json"):
        found = _optional_json(directory / file).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise FormatError(f"{directory / file}: eos_token_id {found!r} is no token id")
            return ids
    return []


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token(value: Any) -> str | None:
    if isinstance(value, dict):  # an AddedToken, written out
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise FormatError(f"tokenizer_config.json: {value!r} is no token")
    return value
