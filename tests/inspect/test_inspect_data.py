"""`lorax inspect data`: what is trained is shown, and what is wrong with rows is an error."""

import json

import pytest
import torch
from command_line import run_lorax
from oracles import llama
from tiny_tokenizer import CHATML, byte_tokenizer

from lorax.data.examples import Example
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.inspect import data
from lorax.training.recipe import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    tokenizer = byte_tokenizer(chat_template=CHATML)
    torch.manual_seed(0)
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "model")
    write_tokenizer(tokenizer, folder / "model")
    return folder


def recipe(folder, rows, **more):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "rows.jsonl"), **more},
        "train": {"output_dir": str(folder / "run")},
    }
    return Recipe.from_dict(values)


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"sum {i}"},
            {"role": "assistant", "content": "x" * i},
        ]
    }
    for i in range(1, 9)
]


def test_good_rows_hold_and_the_pieces_are_the_text(folder):
    found = data.inspect_data(recipe(folder, CHATS), show=2)
    assert found.holds
    assert not found.findings
    first = found.shown[0]
    whole = "<|im_start|>user\nsum 1<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    assert "".join(piece.text for piece in first) == whole
    assert "".join(p.text for p in first if p.trained).startswith("x")
    assert [p.trained for p in first].count(True) == found.trained[0]
    assert sum(count for _, count in data.histogram(found.lengths)) == found.rows == 8


def test_a_character_of_several_tokens_is_not_lost(folder):
    rows = [{"prompt": "größe ", "completion": "日本 ☃"}]
    (row,) = data.inspect_data(recipe(folder, rows), show=1).shown
    shown = "".join(piece.text for piece in row)
    assert shown.startswith("größe 日本 ☃")
    assert "\ufffd" not in shown


@pytest.mark.parametrize(
    ("ids", "trained", "what"),
    [
        ([1, 9, 9, 2], [False, False, False, True], data._EMPTY),
        ([1, 1, 9, 8, 2], [False, False, False, True, True], data._DOUBLE),
        ([1, 9, 8, 2, 7], [False, False, True, False, False], data._UNTRAINED),
    ],
)
def test_each_fault_is_an_error(ids, trained, what):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.backend.id_to_token(50)
    names = {1: tokenizer.bos_token_id, 2: tokenizer.eos_token_id}
    row = Example([names.get(i, i + 60) for i in ids], trained)
    good = Example([names[1], 69, 68, names[2]], [False, False, True, True])
    found = data.findings([good, row], tokenizer, 0.1, 512)
    assert [(f.what, f.rows, f.first, f.is_error) for f in found] == [(what, 1, 2, True)]


@pytest.mark.parametrize(("share", "holds"), [(0.1, False), (1.0, True)])
def test_cut_answers_are_an_error_above_a_share(folder, share, holds):
    rows = [{"prompt": "a ", "completion": "b" * 80} for _ in range(4)]
    found = data.inspect_data(recipe(folder, rows, max_length=20), 1, share)
    assert found.holds is holds
    assert found.findings[0].what == data._CUT


def test_the_command_and_its_page(folder, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(folder, CHATS).to_toml())
    page = tmp_path / "page.html"
    assert "the rows hold" in run_lorax("inspect", "data", path, "--html", page)
    assert 'class="t ' in page.read_text()
    bad = tmp_path / "bad.toml"
    rows = [{"prompt": "a ", "completion": "b" * 80}]
    bad.write_text(recipe(folder, rows, max_length=20).to_toml())
    out = run_lorax("inspect", "data", bad, "--json", code=1)
    assert json.loads(out)["findings"][0]["rows"] == 1
