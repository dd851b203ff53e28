"""Tokenizer directories of every class and dialect: the ids are AutoTokenizer's."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import lorax
from lorax.formats.sentencepiece_files import merges_of
from lorax.formats.tokenizer_files import FILES, write_tokenizer

TEXTS = [
    "the sea is wide",
    "  leading and trailing  ",
    "",
    " ",
    "yes</s>",
    "<s>[INST] hello [/INST] </s><|endoftext|> more<unk>",
    "line\nline\n\n\tend\r\n",
    "Grüße, Ὀδυσσεύς, 海は広い e\u0301",
    "an emoji \U0001f600 or \U0001f469\u200d\U0001f4bb",
    "12345 3.14159 1e30",
    "def f(x):\n    return x ** 2  # it's don't I'll",
    "<image> <tool> <new> <old>",
]
IDS = [5, 1, 40, 2, 77, 0, 51, 3]


@pytest.fixture(autouse=True)
def _quiet():
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def check(directory: Path):
    """Hold lorax's tokenizer against AutoTokenizer's; gives both."""
    from transformers import AutoTokenizer

    theirs, mine = AutoTokenizer.from_pretrained(directory), lorax.load_tokenizer(directory)
    compare(theirs, mine)
    return theirs, mine


def compare(theirs, mine):
    assert mine.special_tokens == theirs.special_tokens_map
    assert mine.extra_special_tokens == theirs.extra_special_tokens
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.bos_token_id == theirs.bos_token_id
    assert mine.eos_token_id == theirs.eos_token_id
    assert mine.vocab_size == len(theirs)
    for text in TEXTS:
        plain = theirs(text, add_special_tokens=False).input_ids
        assert mine.encode(text, add_special_tokens=False) == plain, text
        framed = theirs(text).input_ids
        if framed[:2] == [theirs.bos_token_id] * 2:  # a text that spells bos out gets no second
            framed = framed[1:]
        assert mine.encode(text) == framed, text
        for skip in (False, True):
            want = theirs.decode(plain, skip_special_tokens=skip)
            assert mine.decode(plain, skip_special_tokens=skip) == want, text
    for skip in (False, True):
        want = theirs.decode(IDS, skip_special_tokens=skip)
        assert mine.decode(IDS, skip_special_tokens=skip) == want


# Vocabularies -----------------------------------------------------------------------------------


def byte_vocabulary(specials=("<|endoftext|>",)) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("1", "2"), ("Ã", "¼")]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    return {token: index for index, token in enumerate(tokens)}, merges


def piece_vocabulary() -> dict[str, int]:
    """As sentencepiece's: special tokens, bytes, pieces with U+2581 for a space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    tokens += [chr(code) for code in range(33, 127)]
    tokens += ["\u2581t", "he", "\u2581the", "\u2581y", "es", "\u2581yes", "is", "\u2581\u2581"]
    return {token: index for index, token in enumerate(tokens)}


def byte_backend(specials=("<|endoftext|>",)) -> Backend:
    vocab, merges = byte_vocabulary(specials)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def llama2_backend(normalized: bool = False) -> Backend:
    """As the conversions of 2023 have it."""
    vocab = piece_vocabulary()
    model = models.BPE(
        vocab=vocab, merges=merges_of(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = ("<unk>", "<s>", "</s>")
    backend.add_special_tokens([AddedToken(n, normalized=normalized, special=True) for n in names])
    return backend


def llama3_backend() -> Backend:
    """Whole words that are tokens before any merge; bos by the post-processor."""
    backend = byte_backend(("<s>", "</s>"))
    vocab, merges = byte_vocabulary(("<s>", "</s>"))
    vocab["wide"] = len(vocab)  # no merge makes it
    backend.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return backend


def write(directory: Path, backend: Backend | None = None, **files) -> Path:
    """A directory; `files` by name without .json."""
    directory.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def slow_bytes(directory: Path, **files) -> Path:
    """vocab.json and merges.txt."""
    vocab, merges = byte_vocabulary()
    write(directory, vocab=vocab, **files)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def slow_pieces(directory: Path, kind: str = "bpe", **files) -> Path:
    """tokenizer.model, trained."""
    import sentencepiece

    out = io.BytesIO()
    words = ["the sea is wide and the sky is blue", "what is a boat? yes, 12345", "hello INST"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=out,
        vocab_size=330,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["<old>"],
        minloglevel=2,
    )
    write(directory, **files)
    (directory / "tokenizer.model").write_bytes(out.getvalue())
    return directory


# tokenizer.json ---------------------------------------------------------------------------------

GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


def added(content: str, **flags) -> dict:
    return {"__type": "AddedToken", "content": content, **flags}


def flat(content: str, **flags) -> dict:
    return old(content) | {"special": True} | flags


def old(content: str) -> dict:
    """As special_tokens_map.json has it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, **flags}


@pytest.mark.parametrize(
    "config",
    [
        GENERIC,
        GENERIC | {"model_max_length": 1000000000000000019884624838656},
        GENERIC | {"pad_token": "<new>", "bos_token": added("<old>", lstrip=True)},
        GENERIC | {"extra_special_tokens": ["<tool>", "<new>"]},
        GENERIC | {"additional_special_tokens": ["<tool>", added("<new>", rstrip=True)]},
        GENERIC | {"extra_special_tokens": {"image_token": "<image>"}, "tool_token": "<tool>"},
        GENERIC | {"split_special_tokens": True},
        GENERIC | {"added_tokens_decoder": {"300": flat("<old>"), "299": flat("<new>")}},
        GENERIC
        | {
            "added_tokens_decoder": {
                "0": flat("<|endoftext|>"),
                "263": flat("<tool>", special=False, normalized=True, lstrip=True),
                "264": flat("<image>", rstrip=True),
            },
            "unk_token": "<tool>",
        },
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "pad_token": "<new>"},
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": None},
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<new>"},
        {"tokenizer_class": "Qwen2TokenizerFast", "extra_special_tokens": ["<tool>"]},
        {"tokenizer_class": "GPTNeoXTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|endoftext|>"},
        {"tokenizer_class": "NobodysTokenizer"},
        {},
    ],
    ids=lambda config: ",".join(config)[:60],
)
def test_byte_level_directories_against_transformers(tmp_path, config):
    check(write(tmp_path, byte_backend(), tokenizer_config=config))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"legacy": True},
        LLAMA | {"legacy": False, "add_prefix_space": False},
        LLAMA | {"legacy": None, "add_prefix_space": None, "pad_token": "<new>"},
        LLAMA | {key: added(t, normalized=True) for key, t in [("bos_token", "<s>")]},
        {"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        {"tokenizer_class": "GemmaTokenizer"},
        {"tokenizer_class": "GemmaTokenizerFast", "bos_token": "<s>", "mask_token": None},
        LLAMA
        | {
            "added_tokens_decoder": {
                "0": flat("<unk>", normalized=True),
                "1": flat("<s>", normalized=True),
                "2": flat("</s>", normalized=True),
                "400": flat("<tool>", special=False),
            }
        },
    ],
    ids=lambda config: ",".join(config)[:60],
)
def test_llama2_directories_against_transformers(tmp_path, config, normalized):
    check(write(tmp_path, llama2_backend(normalized), tokenizer_config=config))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizer", None])
def test_the_model_type_has_a_word_in_it_against_transformers(tmp_path, model_type, named):
    config = {} if named is None else {"tokenizer_class": f"{named}Fast"}
    for name, backend in (("bytes", llama3_backend()), ("pieces", llama2_backend())):
        if name == "pieces" and (
            model_type in ("gpt2", "qwen2", "qwen3") or named == "GPT2Tokenizer"
        ):
            continue  # byte-level classes over pieces fit nobody
        files = {"config": {"model_type": model_type}, "tokenizer_config": config}
        check(write(tmp_path / name, backend, **files))


def test_llama3_directory_against_transformers(tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    _, mine = check(write(tmp_path, llama3_backend(), tokenizer_config=config))
    assert mine.prefix == [0]
    assert mine.encode("<s>the") == mine.encode("the")  # no second bos


@pytest.mark.parametrize("number", [10**30, -(10**400), 1e308])
def test_a_number_nobody_uses_harms_nobody(tmp_path, number):
    write(tmp_path, byte_backend(), tokenizer_config=GENERIC | {"model_max_length": number})
    assert lorax.load_tokenizer(tmp_path).encode("a")
    text = json.dumps(GENERIC)[:-1]
    for value in ("9" * 5000, "1e999", "Infinity", "NaN"):
        (tmp_path / "tokenizer_config.json").write_text(f'{text}, "model_max_length": {value}}}')
        assert lorax.load_tokenizer(tmp_path).encode("a")


# Older dialects ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {
            "special_tokens_map": {
                "bos_token": "<s>",
                "eos_token": old("</s>"),
                "unk_token": "<unk>",
            }
        },
        {"special_tokens_map": {"pad_token": "<new>", "additional_special_tokens": ["<tool>"]}},
        {"special_tokens_map": {"extra_special_tokens": ["<tool>", old("<old>")]}},
        {"special_tokens_map": {"image_token": "<image>"}, "added_tokens": {"<tool>": 400}},
        {"added_tokens": {"<tool>": 370, "<old>": 369}},
    ],
    ids=str,
)
@pytest.mark.parametrize("named", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_older_repositories_against_transformers(tmp_path, files, named):
    check(write(tmp_path, llama2_backend(), tokenizer_config={"tokenizer_class": named}, **files))


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"])
@pytest.mark.parametrize(
    "more",
    [{}, {"add_bos_token": True, "bos_token": "<|endoftext|>"}, {"pad_token": "<new>"}],
    ids=str,
)
def test_vocab_and_merges_alone_against_transformers(tmp_path, named, more):
    if named == "GPTNeoXTokenizer" and more.get("add_bos_token"):
        more = more | {"add_eos_token": True}
    check(slow_bytes(tmp_path, tokenizer_config={"tokenizer_class": named, **more}))


def test_vocab_and_merges_with_nothing_beside_them_are_gpt2s(tmp_path):
    slow_bytes(tmp_path / "bare")
    slow_bytes(tmp_path / "named", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    theirs, _ = check(tmp_path / "named")
    compare(theirs, lorax.load_tokenizer(tmp_path / "bare"))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "extra_special_tokens": ["<new>"]},
        {"tokenizer_class": "GemmaTokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
        {},
    ],
    ids=str,
)
def test_a_sentencepiece_model_alone_against_transformers(tmp_path, config, kind):
    check(slow_pieces(tmp_path, kind, tokenizer_config=config))


def test_without_sentencepiece_one_line_says_what_to_do(tmp_path, monkeypatch):
    import sys

    write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05\n\x03<s>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(lorax.LoraxError, match=r"sentencepiece.*save_pretrained") as caught:
        lorax.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"xyz", b"\n\xff\xff\xff", b"\x00" * 100])
def test_a_damaged_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(lorax.LoraxError, match=r"tokenizer\.model"):
        lorax.load_tokenizer(tmp_path)


def test_truncation_and_padding_left_in_the_file_do_nothing_against_transformers(tmp_path):
    backend = byte_backend()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8, pad_id=0, pad_token="<|endoftext|>")
    for named in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
        check(write(tmp_path / named, backend, tokenizer_config={"tokenizer_class": named}))


def test_what_is_no_token_is_refused_by_its_field(tmp_path):
    for key, value in (
        ("bos_token", 3),
        ("eos_token", {"x": 1}),
        ("extra_special_tokens", "x"),
        ("added_tokens_decoder", {"x": {"content": "a"}}),
        ("added_tokens_decoder", [1]),
    ):
        write(tmp_path, byte_backend(), tokenizer_config=GENERIC | {key: value})
        with pytest.raises(lorax.LoraxError, match=r"tokenizer_config\.json"):
            lorax.load_tokenizer(tmp_path)


# Saved by transformers; written by lorax --------------------------------------------------------


@pytest.mark.parametrize(
    "named", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"]
)
def test_what_transformers_saves_and_what_lorax_writes_again(tmp_path, named):
    import transformers

    pieces = named in ("LlamaTokenizer", "GemmaTokenizer")
    vocab, merges = byte_vocabulary()
    if pieces:
        vocab = piece_vocabulary() | ({"<pad>": 400} if named == "GemmaTokenizer" else {})
        vocab = {token: index for index, token in enumerate(vocab)}
        merges = merges_of(piece_vocabulary())
    tokenizer = getattr(transformers, named)(vocab=vocab, merges=merges)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "saved")
    _, mine = check(tmp_path / "saved")
    assert mine.chat_template == "{{ messages }}"
    assert mine.named_templates == tokenizer.chat_template

    (tmp_path / "copied").mkdir()
    write_tokenizer(mine, tmp_path / "copied")
    (tmp_path / "copied" / "generation_config.json").unlink()  # the model's, not the tokenizer's
    copied = [p.relative_to(tmp_path / "copied") for p in (tmp_path / "copied").rglob("*.*")]
    for path in copied:
        same = (tmp_path / "saved" / path).read_bytes() == (tmp_path / "copied" / path).read_bytes()
        assert same, path
    assert len(copied) == len(list((tmp_path / "saved").rglob("*.*")))

    mine.files = None  # as of a GGUF
    (tmp_path / "made").mkdir()
    write_tokenizer(mine, tmp_path / "made")
    theirs, again = check(tmp_path / "made")
    compare(theirs, mine)
    assert again.named_templates == mine.named_templates == theirs.chat_template


def test_a_changed_tokenizer_is_written_anew(tmp_path):
    write(tmp_path / "old", byte_backend(), tokenizer_config=GENERIC | {"odd": 1})
    tokenizer = lorax.load_tokenizer(tmp_path / "old")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ messages }}"
    (tmp_path / "new").mkdir()
    write_tokenizer(tokenizer, tmp_path / "new")
    theirs, mine = check(tmp_path / "new")
    assert mine.pad_token == "<|endoftext|>"
    assert theirs.chat_template == "{{ messages }}"
    shutil.rmtree(tmp_path / "old")  # and one whose files are gone
    (tmp_path / "third").mkdir()
    write_tokenizer(tokenizer, tmp_path / "third")
    check(tmp_path / "third")


def test_every_file_of_a_slow_tokenizer_is_copied(tmp_path):
    slow_bytes(tmp_path / "a", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "b").mkdir()
    write_tokenizer(lorax.load_tokenizer(tmp_path / "a"), tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names & set(FILES) == {"vocab.json", "merges.txt", "tokenizer_config.json"}


# Chat templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ("plain", {}),
        ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], {}),
        ("plain", {"chat_template.jinja": "from a file"}),
        (None, {"chat_template.jinja": "from\r\na file\n"}),
        ("plain", {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"}),
        (None, {"additional_chat_templates/rag.jinja": "b"}),
        (None, {}),
    ],
    ids=str,
)
def test_chat_templates_against_transformers(tmp_path, config, files):
    write(tmp_path, byte_backend(), tokenizer_config=GENERIC | {"chat_template": config})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    theirs, mine = check(tmp_path)
    want = theirs.chat_template
    want = want if isinstance(want, dict) else {} if want is None else {"default": want}
    assert mine.named_templates == want
    assert mine.chat_template == want.get("default")


def test_templates_by_name_go_along_with_a_copy(tmp_path):
    """`lorax quantize` copies the files; transformers puts named templates into a folder."""
    from transformers import PreTrainedTokenizerFast

    from lorax.formats.beside import copy_tokenizer

    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_backend())
    theirs.chat_template = {"default": "a", "tool_use": "b", "rag": "c"}
    theirs.save_pretrained(tmp_path / "saved")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path / "saved", tmp_path / "copy")
    assert lorax.load_tokenizer(tmp_path / "copy").named_templates == theirs.chat_template


def test_an_old_processors_template_is_taken_last(tmp_path):
    write(
        tmp_path, byte_backend(), tokenizer_config=GENERIC, chat_template={"chat_template": "old"}
    )
    assert lorax.load_tokenizer(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert lorax.load_tokenizer(tmp_path).chat_template == "new"


def test_templates_see_all_special_tokens(tmp_path):
    config = GENERIC | {"unk_token": "<old>", "image_token": "<image>"}
    template = "{{ eos_token }}{{ unk_token }}{{ image_token }}{{ bos_token }}"
    write(tmp_path, byte_backend(), tokenizer_config=config | {"chat_template": template})
    theirs, mine = check(tmp_path)
    messages = [{"role": "user", "content": "x"}]
    want = theirs.apply_chat_template(messages, tokenize=False)
    assert mine.apply_chat_template(messages) == want == "<|endoftext|><old><image>"


# Hostile files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "config.json",
        "chat_template.json",
    ],
)
def test_only_loraxerror_escapes_from_mutated_files(tmp_path, name):
    from mutating import mutated

    files = {
        "special_tokens_map": {"eos_token": old("</s>"), "extra_special_tokens": ["<tool>"]},
        "added_tokens": {"<tool>": 400},
        "config": {"model_type": "llama", "eos_token_id": 2},
        "chat_template": {"chat_template": [{"name": "default", "template": "x"}]},
    }
    if name == "tokenizer_config.json":
        files["tokenizer_config"] = LLAMA | {"added_tokens_decoder": {"2": flat("</s>")}}
    else:
        files["tokenizer_config"] = {"tokenizer_class": "LlamaTokenizer"}
    if name in ("vocab.json", "merges.txt"):
        files["tokenizer_config"] = {"tokenizer_class": "GPT2Tokenizer"}
        slow_bytes(tmp_path, **files)
    elif name == "tokenizer.model":
        slow_pieces(tmp_path, **files)
    else:
        write(tmp_path, llama2_backend(), **files)
    lorax.load_tokenizer(tmp_path)
    content, chance, refused = (tmp_path / name).read_bytes(), random.Random(name), 0
    for number in range(60):
        (tmp_path / name).write_bytes(mutated(content, chance))
        try:
            lorax.load_tokenizer(tmp_path).encode("a text")
        except lorax.LoraxError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"mutation {number}: {error!r}")
    assert refused
