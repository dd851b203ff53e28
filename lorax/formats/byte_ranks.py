"""Byte-level BPE that states ranks instead of merges: tiktoken's files and Mistral's tekken.json.

    tokenizer.model, tiktoken.model    a token a line: base64 of its bytes, a space, its rank
                                       (Llama 3 of Meta; its special tokens are not in it)
    tekken.json                        {"config": {"pattern", ...}, "vocab": [{"token_bytes"}, ...],
                                       "special_tokens": [{"rank", "token_str"}, ...]}; the special
                                       tokens take the first ids

A pair may merge wherever the sum of its halves is a token, the lowest rank first; a word that is a
token itself is never cut. As transformers' TikTokenConverter and MistralConverter have it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend

from lorax.errors import FormatError
from lorax.files import read_bounded
from lorax.formats.json_files import MAX_BYTES, read_json
from lorax.formats.special_tokens import SpecialTokens
from lorax.formats.tokenizer_classes import split_bytes

TIKTOKEN, TEKKEN = "tiktoken.model", "tekken.json"
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?(?:\n|$)")
_MAX_TOKEN_BYTES = 1000  # a token is cut at every place
_MAX_SPECIALS = 100_000
_SPLIT = (  # of transformers, for every tiktoken file: cl100k's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_tiktoken(path: Path) -> bool:
    """Whether the file is one of tiktoken's; sentencepiece's have the same name."""
    with path.open("rb") as file:
        return _LINE.match(file.read(4096)) is not None


def read_tiktoken(path: Path, special: SpecialTokens) -> Backend:
    """The backend of a tiktoken file.

    special: those of the files beside it, which tell what stands behind the file's tokens; an id
        that none of them has is a placeholder.

    Raises:
        FormatError: the file is damaged.
    """
    ranks = {}
    try:
        for line in read_bounded(path, MAX_BYTES).splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        vocab = _as_text(ranks)
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: not a readable tiktoken file ({error}); get the file anew"
        ) from None
    names = {index: token.content for index, token in special.added.items()}
    if max(names, default=-1) >= len(vocab) + _MAX_SPECIALS:
        raise FormatError(
            f"{path}: has {len(vocab)} tokens, and a special token beside it the id {max(names)}; "
            f"expected at most {_MAX_SPECIALS} behind them; get both files from one place"
        )
    behind = [
        names.get(index, f"<|reserved_token_{index}|>")
        for index in range(len(vocab), max(names, default=-1) + 1)
    ]
    if special.states_extra:
        behind += [name for name in map(str, special.extra) if name not in behind]
    backend = _build(vocab, _merges(vocab), _SPLIT)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in behind])
    return backend


def read_tekken(path: Path) -> Backend:
    """The backend of a tekken.json, its special tokens included.

    Raises:
        FormatError: the file is damaged, or so old that it does not state its special tokens.
    """
    found = read_json(path)
    if found.get("special_tokens") is None:
        where = str(path.parent)
        raise FormatError(
            f"{path}: states no special_tokens, which versions before 7 leave to the package "
            "mistral-common; expected a list; convert it where that and transformers are "
            "installed: from transformers import AutoTokenizer; AutoTokenizer.from_pretrained("
            f"{where!r}, mistral_format=False).save_pretrained({where!r})"
        )
    try:
        config = found["config"]
        specials = _special_names(found["special_tokens"], config)
        size = config.get("default_vocab_size")
        rows = found["vocab"][: None if size is None else size - len(specials)]
        tokens = [base64.b64decode(row["token_bytes"], validate=True) for row in rows]
        ranked = _as_text({token: rank for rank, token in enumerate(tokens)})
        merges = _merges(ranked)
        vocab = {token: rank + len(specials) for token, rank in ranked.items()}
        vocab |= {name: index for index, name in enumerate(specials)}
        backend = _build(vocab, merges, config["pattern"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path}: not a readable tekken file ({error!r}); get the file anew"
        ) from None
    backend.add_special_tokens([AddedToken(name) for name in specials])
    return backend


def _special_names(stated: Sequence[Any], config: Mapping[str, Any]) -> list[str]:
    """The special tokens by rank, filled up to the number that the config states."""
    by_rank = sorted((row["rank"], row["token_str"]) for row in stated)
    if [rank for rank, _ in by_rank] != list(range(len(by_rank))):
        raise ValueError("the ranks of its special tokens have gaps")
    number = config.get("default_num_special_tokens", len(by_rank))
    if not len(by_rank) <= number <= _MAX_SPECIALS:
        raise ValueError(f"default_num_special_tokens is {number}")
    filled = range(len(by_rank), number)
    return [name for _, name in by_rank] + [f"<SPECIAL_{index}>" for index in filled]


def _as_text(ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Each byte as the character that byte-level BPE has for it."""
    if max(map(len, ranks), default=0) > _MAX_TOKEN_BYTES:
        raise ValueError(f"a token of more than {_MAX_TOKEN_BYTES} bytes")
    table = _byte_characters()
    return {token.decode("latin-1").translate(table): rank for token, rank in ranks.items()}


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: itself where it prints, else one from U+0100 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    return {byte: chr(byte) for byte in printing} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs whose sum is a token: by its rank, then by theirs."""
    found = []
    for token, rank in vocab.items():
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(rank, vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
    return [(a, b) for *_, a, b in sorted(found)]


def _build(vocab: dict[str, int], merges: Iterable[tuple[str, str]], pattern: str) -> Backend:
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=True))
    backend.pre_tokenizer = split_bytes(pattern)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend
