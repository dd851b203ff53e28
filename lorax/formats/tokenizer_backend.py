"""From which files a tokenizer's backend is made:

    tokenizer.json             the `tokenizers` package's own file
    tekken.json                Mistral's, since 2024 (byte_ranks.py)
    tokenizer.model            sentencepiece's (Llama 2, Mistral, Gemma), or tiktoken's (Llama 3)
    tiktoken.model             tiktoken's
    vocab.json + merges.txt    byte-level BPE's (GPT-2, Qwen 2)

The first that is there counts, and the class's rules are laid over it (tokenizer_classes.py); those
of tekken and tiktoken have their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from lorax.errors import FormatError
from lorax.formats.byte_ranks import (
    TEKKEN,
    TIKTOKEN,
    is_tiktoken,
    read_tekken,
    read_tiktoken,
)
from lorax.formats.json_files import MAX_BYTES, read_json
from lorax.formats.sentencepiece_files import build_plain, merges_of, read_sentencepiece
from lorax.formats.special_tokens import (
    SpecialTokens,
    add_special_tokens,
    complete,
    read_special_tokens,
)
from lorax.formats.tokenizer_classes import CLASSES, TokenizerClass, added_again

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE, VOCABULARY, MERGES = "tokenizer.model", "vocab.json", "merges.txt"


def read_backend(
    directory: Path, config: Mapping[str, Any], kind: TokenizerClass
) -> tuple[Backend, SpecialTokens]:
    """The backend, with all special tokens in it.

    Raises:
        FormatError: there is no such file. Also whatever the tokenizers package raises.
    """
    has_words = (directory / VOCABULARY).is_file() and (directory / MERGES).is_file()
    if (directory / JSON).is_file():
        backend, special = _from_json(directory, config, kind)
    elif (directory / TEKKEN).is_file():
        special = read_special_tokens(directory, config)
        complete(special, kind.defaults, kind.extra)
        backend = read_tekken(directory / TEKKEN)
    elif (directory / SENTENCEPIECE).is_file() and not (has_words and kind.is_byte_level):
        backend, special = _from_model(directory, config, kind)
    elif (directory / TIKTOKEN).is_file():
        backend, special = _from_tiktoken(directory / TIKTOKEN, config, kind)
    elif has_words:
        if not kind.is_byte_level:
            kind = CLASSES["GPT2Tokenizer"]  # transformers finds no class here and gives up
        backend, special = _from_words(directory, config, kind)
    else:
        is_adapter = (directory / "adapter_config.json").is_file()
        raise FormatError(
            f"{directory}: no tokenizer.json there, nor tokenizer.model, tekken.json, "
            "tiktoken.model, nor vocab.json with merges.txt; lorax reads no other tokenizer file; "
            "give a directory that has one of them, or let transformers save the tokenizer there"
            + (" (an adapter lies there; its base model has one)" if is_adapter else "")
        )
    add_special_tokens(backend, special)
    if kind.adds_specials:
        tokens = [*special.named.values(), *special.extra]
        backend.add_tokens(added_again([str(token) for token in tokens if token is not None]))
    adds = {"bos": kind.adds_bos, "eos": False}
    if not (directory / JSON).is_file():
        adds = {name: config.get(f"add_{name}_token", adds[name]) for name in adds}
    elif backend.post_processor is not None:  # it says what is added
        adds = {}
    bos, eos = (
        special.text(f"{name}_token") if adds.get(name) else None for name in ("bos", "eos")
    )
    frame_texts(backend, bos, eos)
    return backend, special


def frame_texts(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Let the backend put these tokens around each text."""
    parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    tokens = {token: backend.token_to_id(token) for token in (bos, eos) if token}
    if tokens:
        backend.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=list(tokens.items())
        )


def _from_json(
    directory: Path, config: Mapping[str, Any], kind: TokenizerClass
) -> tuple[Backend, SpecialTokens]:
    """tokenizer.json as it stands, or its vocabulary under the class's own rules."""
    path = directory / JSON
    found = read_json(path)  # sizes, duplicate keys: the package would take them
    special = read_special_tokens(directory, config, found.get("added_tokens") or [])
    padding = found.get("padding")
    if isinstance(padding, dict) and "pad_token" not in {**kind.defaults, **special.named}:
        special.named["pad_token"] = padding.get("pad_token")
    complete(special, kind.defaults, kind.extra)
    if kind.build is None:
        return Backend.from_file(str(path)), special
    vocab = found["model"]["vocab"]
    if isinstance(vocab, list):  # a unigram model's: pieces with their scores
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    merges = [_pair(merge) for merge in found["model"].get("merges") or []]
    backend = kind.build(vocab, merges, config, special.text("unk_token"))
    if kind.keeps_post_processor and found.get("post_processor") is not None:
        bare = json.loads(Backend(models.BPE()).to_str())
        bare["post_processor"] = found["post_processor"]
        backend.post_processor = Backend.from_str(json.dumps(bare)).post_processor
    return backend, special


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Newer files have merges as lists of two."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _from_tiktoken(
    path: Path, config: Mapping[str, Any], kind: TokenizerClass
) -> tuple[Backend, SpecialTokens]:
    special = read_special_tokens(path.parent, config)
    complete(special, kind.defaults, kind.extra)
    return read_tiktoken(path, special), special


def _from_model(
    directory: Path, config: Mapping[str, Any], kind: TokenizerClass
) -> tuple[Backend, SpecialTokens]:
    """tokenizer.model: of sentencepiece or, under the same name, of tiktoken."""
    if is_tiktoken(directory / SENTENCEPIECE):
        return _from_tiktoken(directory / SENTENCEPIECE, config, kind)
    pieces = read_sentencepiece(directory / SENTENCEPIECE)
    special = read_special_tokens(directory, config, pieces=pieces.added)
    if kind.build is None or kind.is_byte_level:
        complete(special, pieces.defaults)
        return build_plain(pieces, special.added), special
    complete(special, kind.defaults, kind.extra)
    merges = merges_of(pieces.vocab)
    return kind.build(pieces.vocab, merges, config, special.text("unk_token")), special


def _from_words(
    directory: Path, config: Mapping[str, Any], kind: TokenizerClass
) -> tuple[Backend, SpecialTokens]:
    assert kind.build is not None
    vocabulary, merges = directory / VOCABULARY, directory / MERGES
    read_json(vocabulary)
    if merges.stat().st_size > MAX_BYTES:
        raise FormatError(f"{merges}: more than {MAX_BYTES} bytes; get the file anew")
    special = read_special_tokens(directory, config)
    complete(special, kind.defaults, kind.extra)
    words, pairs = models.BPE.read_file(str(vocabulary), str(merges))
    return kind.build(words, pairs, config, special.text("unk_token")), special
