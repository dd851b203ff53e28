"""Wounded vocabularies in their older forms, and wounded Parquet (S5): made by their programs."""

import base64
import json

import pytest
from mutating import refused_mutations
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.data.rows import read_rows

pytestmark = pytest.mark.slow

TEXT = ["the sea is wide and the sky is wide", "what does the wide sea say to the sky"] * 40


def sentencepiece_model(folder):
    import sentencepiece

    options = {"vocab_size": 300, "byte_fallback": True, "model_type": "bpe", "minloglevel": 5}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        hard_vocab_limit=False,
        **options,
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


def vocabulary_and_merges(folder):
    backend = json.loads(byte_tokenizer().backend.to_str())
    vocab = backend["model"]["vocab"]
    pairs = [(a, b) for a in "theaswid" for b in "theaswid" if a != b][:20]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(pairs)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))


def ranked():
    return [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"is", b" is"]


def tiktoken_file(folder):
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranked())]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def tekken_file(folder):
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(ranked())
    ]
    specials = [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    content = {"config": {"pattern": r"\p{L}+|\s+|."}, "vocab": rows, "special_tokens": specials}
    (folder / "tekken.json").write_text(json.dumps(content))


def parquet_file(folder):
    import datasets

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    datasets.Dataset.from_list(rows * 8).to_parquet(str(folder / "rows.parquet"))


def tokenize(folder):
    lorax.load_tokenizer(folder).encode("the sea is wide")


FILES = {
    "tokenizer.model": (sentencepiece_model, tokenize),
    "vocab.json": (vocabulary_and_merges, tokenize),
    "merges.txt": (vocabulary_and_merges, tokenize),
    "tokenizer.model of tiktoken": (tiktoken_file, tokenize),
    "tekken.json": (tekken_file, tokenize),
    "rows.parquet": (parquet_file, lambda folder: read_rows(folder / "rows.parquet")),
}


@pytest.mark.parametrize("name", FILES)
def test_only_loraxerror_escapes(tmp_path, name):
    make, load = FILES[name]
    make(tmp_path)
    file = tmp_path / name.partition(" ")[0]
    assert refused_mutations(file, lambda: load(tmp_path), name) > 10
