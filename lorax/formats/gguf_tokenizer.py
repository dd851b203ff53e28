"""The tokenizer inside a GGUF file: a vocabulary and a few words about it.

llama.cpp keeps no tokenizer.json, but the tokens, their kinds, merges or scores, and the name of a
family; the family's rules are in its own source. What a field leaves open, the family decides:
Llama 3's bos is added and whole words that are tokens are taken before any merge; sentencepiece's
vocabularies get a bos and a space in front.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel

from lorax.data.tokenizer import Tokenizer
from lorax.errors import FormatError, UnsupportedModel
from lorax.formats.sentencepiece_files import merges_of
from lorax.formats.tokenizer_backend import frame_texts
from lorax.formats.tokenizer_classes import QWEN2_SPLIT, build_llama, split_bytes

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")  # as they are written
CONTROL, USER_DEFINED = 3, 4  # ggml's kinds of tokens
END_KEYS = ("eot_token_id", "eom_token_id")  # further tokens that end an answer
SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}


def build_tokenizer(fields: dict[str, Any], where: str) -> Tokenizer:
    """Make the tokenizer.

    Args:
        fields: the file's metadata; strings in lists may still be bytes.
        where: names the file in errors.

    Raises:
        UnsupportedModel: a kind or family that is not covered. FormatError: damaged fields.
    """
    about = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    template = fields.get("tokenizer.chat_template")
    try:
        if template is not None and not isinstance(template, str):
            raise ValueError("the chat template is no text")
        about["tokens"] = _texts(about["tokens"])
        special = {key: t for key in SPECIAL if (t := _special(about, key)) is not None}
        ends = [end for key in END_KEYS if (end := _number(about, key)) is not None]
        backend = _backend(about, special, where)
    except (KeyboardInterrupt, SystemExit, UnsupportedModel):
        raise
    except BaseException as error:  # KeyError, IndexError, and what the tokenizers package raises:
        # plain Exceptions, and Rust panics, which are no Exceptions
        raise FormatError(
            f"{where}: the tokenizer's fields do not fit ({error!r}); get the file anew, or "
            "load the tokenizer from the model's Hugging Face directory"
        ) from None
    return Tokenizer(
        backend,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        end_token_ids=ends,
        chat_template=template,
    )


def _backend(about: dict[str, Any], special: dict[str, str], where: str) -> Backend:
    kind = about.get("model")
    vocab = {token: index for index, token in enumerate(about["tokens"])}
    if kind == "gpt2":
        merges = [_pair(merge) for merge in _texts(about["merges"])]
        backend = byte_level(vocab, merges, about.get("pre"), where)
    elif kind == "llama":
        backend = _sentencepiece(vocab, about)
    else:
        raise UnsupportedModel(
            f"{where}: a tokenizer of kind {kind!r}; byte-level BPE (gpt2) and sentencepiece's "
            "(llama) are read from GGUF, so load the tokenizer from the model's Hugging Face "
            "directory"
        )
    for token, token_kind in zip(about["tokens"], about["token_type"], strict=True):
        if token_kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    if kind == "llama":
        backend.add_special_tokens(list(dict.fromkeys(special.values())))
    by_default = kind == "llama" or about.get("pre") in _LLAMA3
    bos = special.get("bos_token") if about.get("add_bos_token", by_default) else None
    eos = special.get("eos_token") if about.get("add_eos_token") else None
    frame_texts(backend, bos, eos)
    return backend


def byte_level(
    vocab: dict[str, int], merges: list[tuple[str, str]], family: str | None, where: str
) -> Backend:
    """Byte-level BPE by the rules of a family, `tokenizer.ggml.pre`.

    Raises:
        UnsupportedModel: a family that is not covered.
    """
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=family in _LLAMA3)
    backend = Backend(model)
    backend.pre_tokenizer = _pre_tokenizer(family, where)
    if family in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = ByteLevel()
    return backend


def _sentencepiece(vocab: dict[str, int], about: dict[str, Any]) -> Backend:
    if "merges" in about:
        merges = [_pair(merge) for merge in _texts(about["merges"])]
    else:
        scores = dict(zip(about["tokens"], about["scores"], strict=True))
        if max(map(len, vocab)) > 1000:
            raise ValueError("a token of more than 1000 characters")
        merges = merges_of(vocab, scores)
    return build_llama(vocab, merges, {"add_prefix_space": about.get("add_space_prefix")}, None)


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _number(about: dict[str, Any], key: str) -> int | None:
    """A token's id, which has to be one."""
    number = about.get(key)
    if number is not None and not 0 <= number < len(about["tokens"]):
        raise ValueError(f"{key} {number} is no token")
    return number


def _special(about: dict[str, Any], name: str) -> str | None:
    number = about.get(f"{SPECIAL[name]}_token_id")
    if number is None:
        return None
    if number < 0:
        raise ValueError("a token id below 0")
    return about["tokens"][number]


def _texts(values: list[str | bytes]) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f"{values!r} is no list of texts")
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _pre_tokenizer(family: str | None, where: str) -> pre_tokenizers.PreTokenizer:
    """How a text is cut before the merges: each family has its own expression."""
    if family == "smollm":
        digits: Any = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, split_bytes(GPT2_SPLIT)])
    if family in ("gpt-2", "gpt2"):
        return split_bytes(GPT2_SPLIT)
    if family in _LLAMA3:
        return split_bytes(_LLAMA3_SPLIT)
    if family in _QWEN2:
        return split_bytes(QWEN2_SPLIT)
    raise UnsupportedModel(
        f"{where}: pre-tokenizer {family!r}; smollm, gpt-2, llama-bpe and qwen2 are read; "
        "load the tokenizer from the model's Hugging Face directory"
    )
