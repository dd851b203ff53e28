"""transformers' tokenizer classes: what each one makes of a vocabulary and its merges.

transformers 5 does not take tokenizer.json as it stands where the directory names a class with
rules of its own. Of such a file it keeps the vocabulary, the merges and the post-processor;
normalizer, pre-tokenizer and decoder come from the class. (That mends the conversions of 2023,
whose "normalized" special tokens no text ever matched.) `class_of` finds the class as AutoTokenizer
does, and the builders are the classes' constructors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]
Builder = Callable[[Vocabulary, Merges, Mapping[str, Any], str | None], Backend]

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerClass:
    """One class.

    defaults: the special tokens where no file names them.
    build: makes the backend; takes vocabulary, merges, tokenizer_config.json and the unk token.
        None: tokenizer.json as it stands.
    is_byte_level: its slow files are vocab.json and merges.txt.
    adds_specials: it adds all its special tokens once more, as plain AddedTokens.
    keeps_post_processor: else it adds neither bos nor eos, whatever tokenizer.json says.
    adds_bos: it puts bos before a text, unless tokenizer_config.json says not.
    extra: names of special tokens that are extra ones, too, unless tokenizer_config.json has some.
    """

    defaults: Mapping[str, str | None]
    build: Builder | None = None
    is_byte_level: bool = False
    adds_specials: bool = False
    keeps_post_processor: bool = True
    adds_bos: bool = False
    extra: tuple[str, ...] = ()


def build_llama(
    vocab: Vocabulary, merges: Merges, config: Mapping[str, Any], unk: str | None
) -> Backend:
    """Llama 2: sentencepiece's BPE, with a space put in front."""
    prefix = config.get("add_prefix_space")
    backend = Backend(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    scheme = "always" if config.get("legacy", False) else "first"
    if prefix is not None and not prefix:
        scheme = "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        steps.append(decoders.Strip(" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def build_code_llama(
    vocab: Vocabulary, merges: Merges, config: Mapping[str, Any], unk: str | None
) -> Backend:
    """Code Llama: Llama 2's, with an unknown token."""
    backend = build_llama(vocab, merges, {"add_prefix_space": config.get("add_prefix_space")}, unk)
    backend.model.unk_token = unk
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)])
    return backend


def build_gemma(
    vocab: Vocabulary, merges: Merges, config: Mapping[str, Any], unk: str | None
) -> Backend:
    """Gemma: sentencepiece's BPE over the whole text, without a space in front."""
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, unk_token=unk, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def build_gpt2(
    vocab: Vocabulary, merges: Merges, config: Mapping[str, Any], unk: str | None
) -> Backend:
    """GPT-2: byte-level BPE within words."""
    backend = _byte_level(vocab, merges)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=_has_prefix(config))
    return backend


def build_gpt_neox(
    vocab: Vocabulary, merges: Merges, config: Mapping[str, Any], unk: str | None
) -> Backend:
    """GPT-NeoX: GPT-2's over composed characters."""
    backend = build_gpt2(vocab, merges, config, unk)
    backend.normalizer = normalizers.NFC()
    return backend


def build_qwen2(
    vocab: Vocabulary, merges: Merges, config: Mapping[str, Any], unk: str | None
) -> Backend:
    """Qwen 2: byte-level BPE, each digit alone, over composed characters."""
    backend = _byte_level(vocab, merges)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split_bytes(QWEN2_SPLIT, _has_prefix(config))
    return backend


def split_bytes(expression: str, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    """Cut a text by an expression, and each piece into bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )


_END = "<|endoftext|>"
_GENERIC = "TokenizersBackend"
_SENTENCEPIECE: dict[str, str | None] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
_GEMMA: dict[str, str | None] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_INFILL = {
    "prefix_token": "\u2581<PRE>",
    "middle_token": "\u2581<MID>",
    "suffix_token": "\u2581<SUF>",
    "eot_token": "\u2581<EOT>",
    "fill_token": "<FILL_ME>",
}
_GPT2: dict[str, str | None] = {
    "bos_token": _END,
    "eos_token": _END,
    "unk_token": _END,
    "pad_token": None,
}
_QWEN2 = {"bos_token": None, "eos_token": _END, "unk_token": _END, "pad_token": _END}

CLASSES = {
    _GENERIC: TokenizerClass({}),
    "LlamaTokenizer": TokenizerClass(_SENTENCEPIECE, build_llama),
    "CodeLlamaTokenizer": TokenizerClass(
        _SENTENCEPIECE | _INFILL, build_code_llama, adds_bos=True, extra=tuple(_INFILL)
    ),
    "GemmaTokenizer": TokenizerClass(_GEMMA, build_gemma),
    "GPT2Tokenizer": TokenizerClass(_GPT2, build_gpt2, is_byte_level=True),
    "Qwen2Tokenizer": TokenizerClass(_QWEN2, build_qwen2, is_byte_level=True, adds_specials=True),
    "GPTNeoXTokenizer": TokenizerClass(
        _GPT2 | {"pad_token": "<|padding|>"},
        build_gpt_neox,
        is_byte_level=True,
        keeps_post_processor=False,
    ),
}

# The class that transformers has for a model type, of the models near those that lorax covers.
_OF_MODEL = {
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "granite": _GENERIC,
    "mistral": _GENERIC,
    "mixtral": _GENERIC,
    "olmo2": _GENERIC,
    "phi": "GPT2Tokenizer",
    "phi3": _GENERIC,
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "stablelm": _GENERIC,
    "starcoder2": "GPT2Tokenizer",
}
_MISNAMED = ("phi3", "qwen2")  # their repositories name the wrong class, so the model type decides


def class_of(model_type: Any, named: Any, is_byte_level: Callable[[], bool]) -> TokenizerClass:
    """The class that AutoTokenizer takes.

    Args:
        model_type: of config.json, or None.
        named: tokenizer_class of tokenizer_config.json, else of config.json, or None.
        is_byte_level: whether tokenizer.json speaks of a ByteLevel step; asked only where it
            matters, for many byte-level repositories say LlamaTokenizer.
    """
    registered = _OF_MODEL.get(model_type) if isinstance(model_type, str) else None
    name = named.removesuffix("Fast") if isinstance(named, str) else registered or _GENERIC
    if registered is not None and registered != name:
        if registered == _GENERIC:
            name = _GENERIC
        elif model_type in _MISNAMED:
            name = registered
    if name == "LlamaTokenizer" and model_type not in _MISNAMED and is_byte_level():
        name = _GENERIC
    return CLASSES.get(name, CLASSES[_GENERIC])


def added_again(names: list[str]) -> list[AddedToken]:
    """Special tokens as the class adds them itself."""
    return [AddedToken(name, special=True) for name in dict.fromkeys(names)]


def _byte_level(vocab: Vocabulary, merges: Merges) -> Backend:
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _has_prefix(config: Mapping[str, Any]) -> bool:
    return bool(config.get("add_prefix_space"))
