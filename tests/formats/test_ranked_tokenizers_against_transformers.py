"""tiktoken's files, tekken.json and Code Llama's class: the ids are AutoTokenizer's."""

import base64
import json

import pytest
from test_tokenizers_against_transformers import check, flat, llama2_backend, slow_pieces, write

import lorax
from lorax.errors import FormatError, UsageError
from lorax.formats.tokenizer_files import write_tokenizer

WORDS = [b"th", b"the", b" the", b"is", b" is", b"12", b"123", b"\xc3\xbc", b"wide", b"s w", b"ye"]
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS  # "wide" and "s w": no merge makes them
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MODELS = [None, "llama", "mistral", "qwen2"]


def tiktoken_directory(directory, name="tokenizer.model", **files):
    write(directory, **files)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS)]
    (directory / name).write_bytes(b"".join(lines))
    return directory


def tekken(**config):
    rows = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(TOKENS)]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    return {
        "config": {"pattern": SPLIT, "default_num_special_tokens": 10, "version": "v7", **config},
        "vocab": rows,
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ],
    }


def tekken_directory(directory, content=None, **files):
    write(directory, **files)
    (directory / "tekken.json").write_text(json.dumps(tekken() if content is None else content))
    return directory


def of_model(model_type, **files):
    return files | ({} if model_type is None else {"config": {"model_type": model_type}})


# What stands beside the file, from nothing to Llama 3's own.
CONFIGS = [
    {},
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "TikTokenTokenizer", "bos_token": "<a>", "add_bos_token": True},
    {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "added_tokens_decoder": {
            "267": flat("<|begin_of_text|>", special=True),
            "275": flat("<|eot_id|>", special=True),  # those between are placeholders
        },
        "add_bos_token": True,
    },
    {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
    {"extra_special_tokens": ["<tool>", "<new>"], "image_token": "<image>"},
]


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_tiktoken_file_against_transformers(tmp_path, config, name, model_type):
    check(tiktoken_directory(tmp_path, name, **of_model(model_type, tokenizer_config=config)))


@pytest.mark.parametrize("model_type", MODELS[:3])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_tekken_against_transformers(tmp_path, config, model_type):
    _, mine = check(tekken_directory(tmp_path, **of_model(model_type, tokenizer_config=config)))
    assert mine.encode("[INST]", add_special_tokens=False) == [3]


@pytest.mark.parametrize("size", [None, 256 + 10, 262 + 10])
def test_tekken_drops_the_end_of_its_vocabulary_against_transformers(tmp_path, size):
    config = {} if size is None else {"default_vocab_size": size}
    _, mine = check(tekken_directory(tmp_path, tekken(**config)))
    assert mine.vocab_size == (size or len(TOKENS) + 10)


def test_a_word_that_is_a_token_is_never_cut_against_transformers(tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiktoken_directory(tmp_path))
    mine = lorax.load_tokenizer(tmp_path)
    for text in ("wide", " wide", "yes w", "thethe 123123", "üü"):
        assert mine.encode(text) == theirs(text).input_ids, text
    assert mine.encode("wide") == [TOKENS.index(b"wide")]


@pytest.mark.parametrize("make", [tiktoken_directory, tekken_directory])
def test_it_is_written_as_it_was_read(tmp_path, make):
    mine = lorax.load_tokenizer(make(tmp_path / "a", tokenizer_config={"bos_token": "<s>"}))
    (tmp_path / "b").mkdir()
    write_tokenizer(mine, tmp_path / "b")
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert {file.name for file in (tmp_path / "b").iterdir()} == names
    check(tmp_path / "b")


def test_a_tokenizer_json_beside_it_wins_as_in_transformers(tmp_path):
    write(tmp_path, llama2_backend(), tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    check(tekken_directory(tiktoken_directory(tmp_path)))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"dGhl 300\nth!e 301\n", b"dGhl 1\ndA== 1 2\n", b"dGhl 1\ndGhl x\n", b"dGhl 1\ndA== 1e4\n"],
)
def test_a_damaged_tiktoken_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        FormatError, match=r"tokenizer\.model.*tiktoken file.*get the file anew"
    ) as e:
        lorax.load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_special_token_far_behind_the_file_is_refused(tmp_path):
    config = {"added_tokens_decoder": {"4000000000": flat("<far>", special=True)}}
    tiktoken_directory(tmp_path, tokenizer_config=config)
    with pytest.raises(FormatError, match=r"has 267 tokens.*the id 4000000000; expected at most"):
        lorax.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": [{"token_bytes": "!"}]},
        {"vocab": 3},
        {"vocab": [{}]},
        {"config": {}},
        {"config": []},
        {"config": {"pattern": "("}},
        {"special_tokens": [{"rank": 1, "token_str": "<s>"}]},
        {"special_tokens": [1]},
        {"config": {"pattern": "a", "default_num_special_tokens": 10**12}},
        {"config": {"pattern": "a", "default_num_special_tokens": 2}},
        {"vocab": [{"token_bytes": base64.b64encode(b"a" * 5000).decode()}]},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_damaged_tekken_file_is_refused_in_one_line(tmp_path, change):
    tekken_directory(tmp_path, tekken() | change)
    with pytest.raises(FormatError, match=r"get (the file|its files) anew") as caught:
        lorax.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_old_tekken_file_names_the_lines_that_convert_it(tmp_path):
    content = tekken()
    del content["special_tokens"]
    tekken_directory(tmp_path, content)
    with pytest.raises(
        FormatError, match=r"mistral-common.*mistral_format=False\)\.save_pretrained"
    ):
        lorax.load_tokenizer(tmp_path)


# Code Llama ---------------------------------------------------------------------------------------

INFILL = {
    "prefix_token": "\u2581<PRE>",
    "middle_token": "\u2581<MID>",
    "suffix_token": "\u2581<SUF>",
    "eot_token": "\u2581<EOT>",
    "fill_token": "<FILL_ME>",
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NONE = dict.fromkeys(INFILL)


@pytest.mark.parametrize("made", ["json", "no post-processor", "pieces"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        INFILL | NAMED,
        NONE | {"add_prefix_space": False, "additional_special_tokens": ["<new>"]},
        {"additional_special_tokens": list(INFILL.values())[:4], "add_bos_token": False},
        {"add_eos_token": True, "legacy": True},
        {"added_tokens_decoder": {"400": flat("\u2581<PRE>", special=True)}},
    ],
    ids=range(6),
)
def test_code_llama_against_transformers(tmp_path, config, made):
    files = {"tokenizer_config": {"tokenizer_class": "CodeLlamaTokenizer", **config}}
    if made == "pieces":
        slow_pieces(tmp_path, **files, config={"model_type": "llama"})
    else:
        backend = llama2_backend()
        if made != "json":
            backend.post_processor = None
        write(tmp_path, backend, **files, config={"model_type": "llama"})
    theirs, mine = check(tmp_path)
    for text in ("\u2581<PRE> def f( \u2581<SUF>return x \u2581<MID>", "x\u2581<EOT>", "<FILL_M"):
        assert mine.encode(text) == theirs(text).input_ids, text


def test_what_transformers_saves_of_code_llama_against_transformers(tmp_path):
    from transformers import CodeLlamaTokenizer

    slow_pieces(tmp_path, tokenizer_config={"tokenizer_class": "CodeLlamaTokenizer"})
    CodeLlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    _, mine = check(tmp_path / "saved")
    assert mine.other_tokens == INFILL


def test_the_place_to_fill_in_is_refused_with_what_transformers_makes_of_it(tmp_path):
    from transformers import AutoTokenizer

    write(tmp_path, llama2_backend(), tokenizer_config={"tokenizer_class": "CodeLlamaTokenizer"})
    mine = lorax.load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=r"<FILL_ME> stands.*; write '") as caught:
        mine.encode("the<FILL_ME>is")
    advice = str(caught.value).split("write ")[1].strip("'")
    theirs = AutoTokenizer.from_pretrained(tmp_path)("the<FILL_ME>is").input_ids
    assert mine.encode(advice.replace("BEFORE", "the").replace("BEHIND", "is")) == theirs
