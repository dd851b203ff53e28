"""Tokenizers inside GGUF files: the families' rules, and the fast reader."""

from pathlib import Path

import numpy as np
import pytest
from test_tokenizers_against_transformers import (
    TEXTS,
    byte_vocabulary,
    llama3_backend,
    piece_vocabulary,
)

import lorax

SENTENCEPIECE = {"bos": 1, "eos": 2, "unk": 0}


def write_gguf(path: Path, tokens, kinds, kind, pre="default", merges=None, scores=None, **more):
    """A GGUF whose model is too small to run. more: bos, eos, unk ids; flags as llama.cpp's."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges is not None:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    if scores is not None:
        writer.add_token_scores(scores)
    for name in ("bos", "eos", "unk"):
        if name in more:
            getattr(writer, f"add_{name}_token_id")(more.pop(name))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 16), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(path: Path, **more) -> Path:
    """As Llama 2, TinyLlama and Mistral: sentencepiece's vocabulary with scores."""
    vocab = piece_vocabulary() | {"<tool>": 400}
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(vocab) - 260) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(vocab) - 259)]
    return write_gguf(path, [*vocab], kinds, "llama", scores=scores, **(SENTENCEPIECE | more))


def test_sentencepiece_in_a_gguf_against_transformers(tmp_path):
    from transformers import AutoTokenizer

    pieces(tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    mine = lorax.load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        if not text.startswith("<s>"):
            assert mine.encode(text) == theirs(text).input_ids, text
        plain = theirs(text, add_special_tokens=False).input_ids
        assert mine.encode(text, add_special_tokens=False) == plain, text
        for skip in (False, True):
            want = theirs.decode(plain, skip_special_tokens=skip)
            assert mine.decode(plain, skip_special_tokens=skip) == want, text
    assert (mine.bos_token, mine.eos_token, mine.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("more", "ids"),
    [
        ({}, [1, 365]),
        ({"add_bos_token": False}, [365]),
        ({"add_eos_token": True}, [1, 365, 2]),
    ],
    ids=str,
)
def test_sentencepieces_flags(tmp_path, more, ids):
    tokenizer = lorax.load_tokenizer(pieces(tmp_path / "m.gguf", **more))
    found = tokenizer.encode("yes")
    yes = tokenizer.backend.token_to_id("\u2581yes")
    assert found == [yes if i == 365 else i for i in ids]


def test_no_space_in_front_where_the_file_says_so(tmp_path):
    tokenizer = lorax.load_tokenizer(pieces(tmp_path / "m.gguf", add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode("yes", add_special_tokens=False)) == "yes"
    assert tokenizer.encode("y") == [1, tokenizer.backend.token_to_id("y")]


def test_llama3_in_a_gguf_is_its_tokenizer_json(tmp_path):
    vocab, merges = byte_vocabulary(("<s>", "</s>"))
    tokens = [*vocab, "wide"]
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    write_gguf(tmp_path / "m.gguf", tokens, kinds, "gpt2", "llama-bpe", merges, bos=0, eos=1)
    mine, backend = lorax.load_tokenizer(tmp_path / "m.gguf"), llama3_backend()
    from lorax.formats.gguf_tokenizer import _LLAMA3_SPLIT
    from lorax.formats.tokenizer_classes import split_bytes

    backend.pre_tokenizer = split_bytes(_LLAMA3_SPLIT)
    for text in [*TEXTS, "wide"]:
        if not text.startswith("<s>"):
            assert mine.encode(text) == backend.encode(text).ids, text
    assert mine.prefix == [0]


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize(("pre", "by_default"), [("llama-bpe", True), ("gpt-2", False)])
def test_whether_a_bos_is_added(tmp_path, pre, by_default, bos):
    vocab, merges = byte_vocabulary(("<s>", "</s>"))
    kinds = [3, 3] + [1] * (len(vocab) - 2)
    more = {} if bos is None else {"add_bos_token": bos}
    write_gguf(tmp_path / "m.gguf", [*vocab], kinds, "gpt2", pre, merges, bos=0, eos=1, **more)
    prefix = lorax.load_tokenizer(tmp_path / "m.gguf").prefix
    assert prefix == ([0] if (by_default if bos is None else bos) else [])


def test_qwen2_in_a_gguf_against_transformers(tmp_path):
    from transformers import AutoTokenizer

    vocab, merges = byte_vocabulary()
    kinds = [3] + [1] * (len(vocab) - 1)
    write_gguf(tmp_path / "m.gguf", [*vocab], kinds, "gpt2", "qwen2", merges, eos=0)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    mine = lorax.load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        if "\u0301" not in text:  # which Qwen2Tokenizer composes, and the GGUF reader does not
            assert mine.encode(text) == theirs(text).input_ids, text


def test_a_token_that_is_a_screen_long_is_refused(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "a", "a" * 2000]
    write_gguf(tmp_path / "m.gguf", tokens, [2, 3, 3, 1, 1], "llama", scores=[0.0] * 5)
    with pytest.raises(lorax.LoraxError, match="1000 characters"):
        lorax.load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
def test_the_fast_reader_reads_what_the_package_reads(tmp_path, endian):
    import gguf

    from lorax.formats.gguf_reader import FastReader

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian[endian])
    writer.add_array("texts", ["a", "", "\u6d77" * 300])
    writer.add_array("numbers", [1, -2, 2**31 - 1])
    writer.add_array("reals", [0.5, -1e30])
    writer.add_array("flags", [True, False])
    writer.add_string("one", "text")
    writer.add_tensor("t", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs, mine = gguf.GGUFReader(tmp_path / "m.gguf"), FastReader(tmp_path / "m.gguf")
    assert [*mine.fields] == [*theirs.fields]
    for name, field in theirs.fields.items():
        found = mine.fields[name].contents()
        if name == "texts":
            found = [text.decode() for text in found]
        assert found == field.contents(), name
    assert mine.tensors[0].data.tobytes() == theirs.tensors[0].data.tobytes()


def test_every_cut_of_a_file_with_lists_is_refused(tmp_path):
    whole = pieces(tmp_path / "m.gguf").read_bytes()
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.99):
        (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(lorax.LoraxError, match=r"cut\.gguf"):
            lorax.load_tokenizer(tmp_path / "cut.gguf")
