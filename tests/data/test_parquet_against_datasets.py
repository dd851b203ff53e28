"""Parquet files as datasets, pandas and pyarrow write them: the rows are those that datasets reads,
and they train as the same rows do in JSON lines."""

import json
import os
import random
import sys

import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, disable_progress_bars
from pyarrow import parquet
from test_rows import SYSTEM, TALK, TOOL, TOOLS_CHATML, TURNS
from tiny_tokenizer import byte_tokenizer

from lorax.data.examples import load_examples
from lorax.data.rows import read_rows
from lorax.errors import DataError, EnvironmentProblem

disable_progress_bars()
CALL = {"type": "function", "function": {"name": "depth", "arguments": {"of": "river"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "width", "description": "how wide"}}
LONG = "a river " * 20_000


def read(path):
    return [row for row, _ in read_rows(path)]


def from_datasets(path):
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache")).to_list()


def arrow(**columns):
    return pa.table({name: pa.array(*column) for name, column in columns.items()})


WRITERS = {
    "text": lambda path: Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]}).to_parquet(path),
    "messages": lambda path: Dataset.from_list([{"messages": TALK}] * 3).to_parquet(path),
    "sharegpt": lambda path: Dataset.from_list([{"conversations": TURNS}] * 3).to_parquet(path),
    "large lists": lambda path: parquet.write_table(
        arrow(
            messages=(
                [TALK],
                pa.large_list(pa.struct({"role": pa.large_string(), "content": pa.string()})),
            )
        ),
        path,
    ),
    "large_string": lambda path: parquet.write_table(
        arrow(
            prompt=(["river", "Ὀδυσσεύς", LONG], pa.large_string()),
            completion=(["stone", "", None], pa.large_string()),
        ),
        path,
    ),
    "string_view": lambda path: parquet.write_table(
        arrow(text=(["river", "a text of more than twelve bytes"], pa.string_view())), path
    ),
    "dictionary": lambda path: parquet.write_table(
        pa.table({"text": pa.array(["a", "b", "a", None, "a"]).dictionary_encode()}), path
    ),
    "int32 labels": lambda path: parquet.write_table(
        arrow(text=(["a", "b"],), label=([0, None], pa.int32())), path
    ),
    "ClassLabel": lambda path: Dataset.from_dict(
        {"text": ["a", "b"], "label": [0, 1]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])}),
    ).to_parquet(path),
    "pandas": lambda path: pd.DataFrame(
        {
            "instruction": ["a", None],
            "output": pd.Categorical(["x", "y"]),
            "score": [0.5, 1.0],
            "when": pd.to_datetime(["2020-01-01", "2021-01-01"]),
        },
        index=["first", "second"],
    ).to_parquet(path),
    "row groups": lambda path: parquet.write_table(
        arrow(text=([str(number) for number in range(1000)],)), path, row_group_size=64
    ),
    "empty lists": lambda path: Dataset.from_dict(
        {"text": ["a", "b"], "tags": [[], ["x"]]},
        features=Features({"text": Value("string"), "tags": List(Value("string"))}),
    ).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_against_datasets(tmp_path, name):
    path = tmp_path / "rows.parquet"
    WRITERS[name](path)
    assert read(path) == from_datasets(path)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_every_compression_against_datasets(tmp_path, compression):
    path = tmp_path / "rows.PARQUET"
    parquet.write_table(arrow(text=(["a", "b"] * 50,)), path, compression=compression)
    plain = tmp_path / "rows.parquet"
    parquet.write_table(arrow(text=(["a", "b"] * 50,)), plain)
    assert read(path) == from_datasets(plain)


ROWS = {
    "alpaca": [
        {"instruction": "river", "input": "wide", "output": "stone"},
        {"instruction": "lake", "input": None, "output": "reed"},
    ],
    "prompt and completion": [{"prompt": "river: ", "completion": "stone"}] * 2,
    "messages": [{"messages": TALK}, {"messages": [SYSTEM, *TALK, *TALK]}],
    "turns with and without a weight": [
        {"conversations": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]},
        {"conversations": TURNS},
    ],
    "a call beside plain answers": [
        {"messages": TALK},
        {
            "messages": [
                TALK[0],
                {"role": "assistant", "content": "I look", "tool_calls": [CALL]},
                *TALK,
            ]
        },
    ],
    "tools of different shapes": [
        {"messages": TALK, "tools": [TOOL]},
        {"messages": TALK, "tools": [OTHER_TOOL, TOOL]},
        {"messages": TALK, "tools": []},
    ],
    "a system text in one row": [
        {"messages": TALK, "system": "be amber"},
        {"messages": TALK, "system": None},
    ],
    "labels": [{"text": "river", "label": 1}, {"text": "lake", "label": 0}],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_train_as_in_json_lines(tmp_path, name):
    template = TOOLS_CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    )
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=template)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[name])
    (tmp_path / "rows.jsonl").write_text(lines)
    Dataset.from_list(ROWS[name]).to_parquet(tmp_path / "rows.parquet")
    found, expected = (
        load_examples(tmp_path / f"rows.{ending}", tokenizer, 10_000)
        for ending in ("parquet", "jsonl")
    )
    assert [(row.ids, row.trained) for row in found.rows] == [
        (row.ids, row.trained) for row in expected.rows
    ]


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    path = tmp_path / "prompt=train" / "rows.parquet"
    path.parent.mkdir()
    parquet.write_table(arrow(text=(["a"],)), path)
    assert read(path) == [{"text": "a"}]


def test_a_row_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", None]}).to_parquet(path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: completion is null; expected"):
        load_examples(path, byte_tokenizer(), 100)


# What cannot be read ------------------------------------------------------------------------------


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(EnvironmentProblem, match="pip install pyarrow"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("cut", [0, 4, 100, -5])
def test_a_file_that_is_cut_off_is_one_line(tmp_path, cut):
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow(text=(["a", "b"],)), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"cannot be read.*expected a Parquet file") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow(text=(["marker"],)), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    assert content.count(b"marker") > 0
    path.write_bytes(content.replace(b"marker", b"mar\xffer"))
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(path)


def test_two_columns_of_one_name_and_no_rows_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), path)
    with pytest.raises(DataError, match="text"):
        read_rows(path)
    parquet.write_table(arrow(text=(["a"],)).slice(0, 0), path)
    with pytest.raises(DataError, match="no rows"):
        read_rows(path)


def test_what_is_no_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="no regular file"):
        read_rows(tmp_path / "rows.parquet")


def test_only_dataerrors_escape_from_mutated_files(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"messages": TALK}] * 4).to_parquet(path)
    content, chance = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(bytes(changed))
        try:
            read_rows(path)
        except DataError:
            refused += 1
    assert refused > 50
