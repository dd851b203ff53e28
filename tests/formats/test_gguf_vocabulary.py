"""Tokenizers written as GGUF's fields and read again: the same ids and texts.

Texts are drawn by hypothesis, special tokens and pieces of the vocabulary among them.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizers_against_transformers import (
    TEXTS,
    byte_backend,
    byte_vocabulary,
    llama2_backend,
    llama3_backend,
    piece_vocabulary,
)
from tiny_tokenizer import CHATML
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from lorax.data.tokenizer import Tokenizer
from lorax.errors import UnsupportedModel
from lorax.formats.gguf_tokenizer import build_tokenizer
from lorax.formats.gguf_vocabulary import vocabulary_fields
from lorax.formats.sentencepiece_files import merges_of
from lorax.formats.tokenizer_backend import frame_texts
from lorax.formats.tokenizer_classes import CLASSES, build_gemma, build_llama, build_qwen2

BYTES, PIECES = ("<s>", "</s>"), ("<unk>", "<s>", "</s>")


def smollm() -> Backend:
    """As SmolLM2's tokenizer.json has it."""
    backend = byte_backend(BYTES)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    return backend


def meta_llama3() -> Backend:
    """As Llama 3's: an expression cuts, bytes follow."""
    from lorax.formats.gguf_tokenizer import _LLAMA3_SPLIT
    from lorax.formats.tokenizer_classes import split_bytes

    backend = llama3_backend()
    backend.pre_tokenizer = split_bytes(_LLAMA3_SPLIT)
    return backend


def qwen2() -> Backend:
    backend = build_qwen2(*byte_vocabulary(BYTES), {}, None)
    backend.add_special_tokens([AddedToken(token, special=True) for token in BYTES])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


def pieces(build=build_llama, **config) -> Backend:
    vocab = piece_vocabulary()
    backend = build(vocab, merges_of(vocab), config, "<unk>")
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in PIECES])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    frame_texts(backend, "<s>", None)
    return backend


MAKE = {
    "smollm": smollm,
    "gpt2": lambda: byte_backend(BYTES),
    "llama 3": meta_llama3,
    "qwen2": qwen2,
    "llama 2": pieces,
    "llama 2, no space in front": lambda: pieces(add_prefix_space=False),
    "gemma": lambda: pieces(build_gemma),
}


def wrapped(backend: Backend, **more) -> Tokenizer:
    unk = {"unk_token": "<unk>"} if backend.token_to_id("<unk>") is not None else {}
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", **(unk | more))


def again(tokenizer: Tokenizer, rows: int | None = None) -> Tokenizer:
    fields = vocabulary_fields(tokenizer, rows or tokenizer.vocab_size, "test")
    return build_tokenizer(json.loads(json.dumps(fields)), "test")


PAIRS = {name: (wrapped(make()), again(wrapped(make()))) for name, make in MAKE.items()}
WORDS = ["the", " the", "12", "2024", "\n\n", "ü", "e\u0301", "is", "  ", "'ll", "<tool>", "\u2581"]
DRAWN = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=8).map("".join)


@pytest.mark.parametrize("kind", MAKE)
@given(text=DRAWN)
def test_drawn_texts_have_the_same_ids_and_come_back_the_same(kind, text):
    before, after = PAIRS[kind]
    for add in (True, False):
        ids = before.encode(text, add_special_tokens=add)
        assert after.encode(text, add_special_tokens=add) == ids
        for skip in (True, False):
            assert after.decode(ids, skip_special_tokens=skip) == before.decode(ids, skip)


@pytest.mark.parametrize("kind", MAKE)
def test_special_tokens_and_what_stands_around_a_text(kind):
    before, after = PAIRS[kind]
    assert after.special_tokens == before.special_tokens
    assert after.prefix == before.prefix
    for text in TEXTS:
        assert after.encode(text) == before.encode(text), text


def test_the_2023_conversions_of_llama_2_are_taken_by_their_meaning():
    backend = llama2_backend()
    frame_texts(backend, "<s>", None)
    after = again(wrapped(backend))
    for text in TEXTS[:1] + TEXTS[6:11]:  # without a space in front
        assert after.encode(text) == wrapped(backend).encode(text), text


@pytest.mark.parametrize("frame", [("<s>", "</s>"), (None, "</s>"), (None, None)])
def test_bos_and_eos_are_added_as_they_were(frame):
    backend = meta_llama3()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    frame_texts(backend, *frame)
    assert again(wrapped(backend)).encode("a is") == wrapped(backend).encode("a is")


def test_template_ends_and_rows_without_a_token():
    backend = smollm()
    backend.add_special_tokens(["<end>", "<over>"])
    ends = [backend.token_to_id("<end>"), backend.token_to_id("<over>")]
    before = wrapped(backend, chat_template=CHATML, end_token_ids=ends)
    fields = vocabulary_fields(before, before.vocab_size + 3, "test")
    after = build_tokenizer(fields, "test")
    assert after.chat_template == CHATML
    assert after.end_token_ids == before.end_token_ids
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{before.vocab_size + 2}]"
    assert fields["tokenizer.ggml.token_type"][-4:] == [3, 5, 5, 5]
    with pytest.raises(UnsupportedModel, match=f"embedding {before.vocab_size - 1} rows"):
        vocabulary_fields(before, before.vocab_size - 1, "test")


def test_no_tokenizer_is_said():
    assert vocabulary_fields(None, 9, "test") == {"tokenizer.ggml.model": "no_vocab"}


def odd(change) -> Backend:
    backend = smollm()
    change(backend)
    return backend


def other_order() -> Backend:
    vocab = piece_vocabulary()
    merges = merges_of(vocab)
    backend = build_llama(vocab, [*merges[1:], merges[0]], {}, None)
    backend.model = models.BPE(vocab=vocab, merges=merges[:-1], byte_fallback=True)
    return backend


def no_bytes() -> Backend:
    vocab = {piece: i for i, piece in enumerate(p for p in piece_vocabulary() if p[:3] != "<0x")}
    return build_llama(vocab, merges_of(vocab), {}, None)


REFUSED = {
    "unigram": (lambda: Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "is Unigram"),
    "another expression": (
        lambda: odd(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace())),
        "Whitespace",
    ),
    "no cutting": (
        lambda: odd(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False))),
        "how the tokenizer cuts",
    ),
    "a space in front": (
        lambda: odd(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel())),
        "add_prefix_space",
    ),
    "a normalizer": (
        lambda: odd(lambda b: setattr(b, "normalizer", normalizers.Lowercase())),
        "how the tokenizer cuts",
    ),
    "another frame": (
        lambda: odd(lambda b: setattr(b, "post_processor", processors.TemplateProcessing(
            single="$A <s>", special_tokens=[("<s>", 0)]))),
        "other tokens around a text",
    ),
    "merges that scores do not give": (other_order, "no scores give"),
    "no byte tokens": (no_bytes, "lacks tokens <0x00>"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_refused_by_name(case):
    make, word = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=word):
        vocabulary_fields(wrapped(make()), 1000, "test")


def test_every_class_that_lorax_builds_is_written_or_refused():
    written = []
    for name, kind in CLASSES.items():
        if kind.build is None:
            continue
        is_pieces = kind.build.__name__ in ("build_llama", "build_code_llama", "build_gemma")
        vocab = piece_vocabulary() if is_pieces else byte_vocabulary(BYTES)[0]
        merges = merges_of(vocab) if is_pieces else byte_vocabulary(BYTES)[1]
        try:
            again(wrapped(kind.build(vocab, merges, {}, "<unk>")))
        except UnsupportedModel:
            continue
        written.append(name)
    assert {"LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"} <= set(written)
