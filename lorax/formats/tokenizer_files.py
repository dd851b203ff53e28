"""A tokenizer's directory, read and written.

The backend comes from tokenizer.json or its older forms (tokenizer_backend.py), with the special
tokens that lie beside it (special_tokens.py) and the chat templates (chat_template_files.py). The
outcome is transformers' AutoTokenizer's: the same ids, special tokens and template.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lorax.data.tokenizer import Tokenizer
from lorax.errors import FormatError, LoraxError
from lorax.formats import chat_template_files
from lorax.formats.byte_ranks import TEKKEN, TIKTOKEN
from lorax.formats.json_files import read_json
from lorax.formats.tokenizer_backend import (
    CONFIG,
    JSON,
    MERGES,
    SENTENCEPIECE,
    VOCABULARY,
    read_backend,
)
from lorax.formats.tokenizer_classes import class_of

FILES = (
    JSON,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    VOCABULARY,
    MERGES,
    SENTENCEPIECE,
    TEKKEN,
    TIKTOKEN,
    chat_template_files.FILE,
    chat_template_files.OLD_FILE,
)


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read a tokenizer directory.

    Raises:
        FormatError: there is no tokenizer, or a file is damaged.
        EnvironmentProblem: only tokenizer.model is there, and the package for it is missing.
    """
    config = _optional_json(directory / CONFIG)
    model = _optional_json(directory / "config.json")
    kind = class_of(
        model.get("model_type"),
        config.get("tokenizer_class") or model.get("tokenizer_class"),
        lambda: b'"ByteLevel"' in _bytes(directory / JSON),
    )
    try:
        backend, special = read_backend(directory, config, kind)
    except (KeyboardInterrupt, SystemExit, LoraxError):
        raise
    except BaseException as error:  # plain Exceptions, and Rust panics, which are no Exceptions
        raise FormatError(
            f"{directory}: not a readable tokenizer ({error}); "
            "get its files anew, or save it again with transformers"
        ) from None
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    backend.no_truncation()  # left there by whoever saved it; a text is cut or filled on request
    backend.no_padding()
    named = {key: str(token) for key, token in special.named.items() if token is not None}
    templates = chat_template_files.read_chat_templates(directory, config)
    return Tokenizer(
        backend,
        **{key: named.pop(key, None) for key in ("bos_token", "eos_token", "pad_token")},
        unk_token=named.pop("unk_token", None),
        other_tokens=named,
        extra_special_tokens=[str(token) for token in special.extra],
        chat_template=templates.get("default"),
        named_templates=templates,
        end_token_ids=_end_token_ids(directory),
        files=directory,
    )


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a tokenizer's files into a directory: the very files it was read from, if it is as it
    was; else tokenizer.json, tokenizer_config.json and the chat templates.
    """
    if not _copy_files(tokenizer, directory):
        (directory / JSON).write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokenizer.special_tokens,
        }
        if tokenizer.extra_special_tokens:
            config["extra_special_tokens"] = tokenizer.extra_special_tokens
        if tokenizer.backend.encode_special_tokens:
            config["split_special_tokens"] = True
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        chat_template_files.write_chat_templates(_templates(tokenizer), directory)
    if tokenizer.end_token_ids:
        generation = {"eos_token_id": list(tokenizer.end_token_ids)}
        text = json.dumps(generation, indent=2) + "\n"
        (directory / "generation_config.json").write_text(text)


def read_template(directory: Path) -> str | None:
    """The chat template in a directory, whether or not a tokenizer lies there."""
    config = _optional_json(directory / "tokenizer_config.json")
    return chat_template_files.read_chat_templates(directory, config).get("default")


def _copy_files(tokenizer: Tokenizer, directory: Path) -> bool:
    """Copy the files behind a tokenizer, if reading them again gives the same one."""
    source = tokenizer.files
    if source is None:
        return False
    try:
        if _state(read_tokenizer(source)) != _state(tokenizer):
            return False
    except LoraxError:  # moved, or changed since
        return False
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    for path in (source / chat_template_files.DIRECTORY).glob("*.jinja"):
        (directory / chat_template_files.DIRECTORY).mkdir(exist_ok=True)
        shutil.copyfile(path, directory / chat_template_files.DIRECTORY / path.name)
    return True


def _state(tokenizer: Tokenizer) -> tuple[Any, ...]:
    return (
        tokenizer.backend.to_str(),
        tokenizer.backend.encode_special_tokens,
        tokenizer.special_tokens,
        tokenizer.extra_special_tokens,
        _templates(tokenizer),
    )


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    plain = tokenizer.chat_template
    others = {k: v for k, v in tokenizer.named_templates.items() if k != "default"}
    return others if plain is None else {"default": plain, **others}


def _end_token_ids(directory: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: a number, a list or nothing."""
    for file in ("generation_config.json", "config.json"):
        found = _optional_json(directory / file).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise FormatError(
                    f"{directory / file}: eos_token_id {found!r} is no token id; "
                    "expected a whole number from 0 on, or a list of them"
                )
            return ids
    return []


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, constants=True) if path.is_file() else {}
