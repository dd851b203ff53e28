"""What a row's columns mean: each is used, or refused by name; and the files that hold them."""

import json

import pytest
from tiny_tokenizer import CHATML, byte_tokenizer, said

from lorax.data.examples import load_examples
from lorax.errors import DataError, RecipeError
from lorax.training.recipe import Recipe

TOOL = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}
TOOLS_CHATML = "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}" + CHATML
TALK = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]
TURNS = [{"from": "human", "value": "river"}, {"from": "gpt", "value": "stone"}]
SYSTEM = {"role": "system", "content": "be amber"}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "river"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "stone"}]},
]


@pytest.fixture
def load(tmp_path):
    """Write rows as jsonl, load them: the shown text and what of it is trained."""

    def load_rows(*rows, template=TOOLS_CHATML, columns=None):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=template)
        examples = load_examples(path, tokenizer, 10_000, columns)
        return [(tokenizer.decode(row.ids), said(row, tokenizer)) for row in examples.rows]

    return load_rows


LAYOUTS = [
    {"messages": TALK},
    {"conversations": TURNS},
    {"conversations": TALK},
    {"conversation": TURNS},
    {"messages": TURNS},
    {"messages": PARTS},
    {"messages": json.dumps(TALK)},
    {"messages": [{**m, "name": None, "tool_calls": None} for m in TALK]},
    {"instruction": "river", "output": "stone"},
    {"instruction": "river", "input": None, "output": "stone", "text": "### River: stone"},
    {"instruction": "river", "response": "stone", "context": "", "category": "open_qa"},
    {"prompt": "river", "response": "stone"},
    {"question": "river", "answer": "stone", "id": 7},
    {"question": "river", "response": "stone", "system_prompt": ""},
    {"query": "river", "response": "stone", "source": "web"},
    {"input": "river", "output": "stone"},
    {"problem": "river", "solution": "stone", "level": 3},
    {"prompt": TALK[:1], "completion": TALK[1:]},
    {"prompt": "river", "prompt_id": "a1", "messages": TALK},
]


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: ",".join(row))
def test_a_layout_of_one_question_and_its_answer(load, row):
    ((text, trained),) = load(row)
    assert trained == ["stone<|im_end|>"]
    assert text == ("<|im_start|>user\nriver<|im_end|>\n<|im_start|>assistant\nstone<|im_end|>\n")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "river", "input": "wide", "output": "stone"},
        {"instruction": "river", "context": "wide", "response": "stone"},
        {"question": "river", "context": "wide", "answer": "stone"},
        {"prompt": "river", "input": "wide", "output": "stone"},
    ],
)
def test_what_a_question_is_about_stands_behind_it(load, row):
    ((text, trained),) = load(row)
    assert "user\nriver\n\nwide<|im_end|>" in text
    assert trained == ["stone<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "system": "be amber"},
        {"messages": [SYSTEM, *TALK], "system": "be amber"},
        {"conversations": TURNS, "system": "be amber"},
        {"conversations": [{"from": "system", "value": "be amber"}, *TURNS]},
        {"instruction": "river", "output": "stone", "system": "be amber"},
        {"system_prompt": "be amber", "question": "river", "response": "stone"},
        {"prompt": [SYSTEM, TALK[0]], "completion": [TALK[1]]},
    ],
)
def test_the_system_text_is_used_wherever_it_stands(load, row):
    ((text, trained),) = load(row)
    assert text.startswith("<|im_start|>system\nbe amber<|im_end|>\n<|im_start|>user\nriver")
    assert text.count("amber") == 1
    assert trained == ["stone<|im_end|>"]


def test_history_is_earlier_rounds_and_is_trained(load):
    row = {"instruction": "river", "output": "stone", "history": [["cedar", "falcon"]]}
    ((text, trained),) = load(row)
    assert trained == ["falcon<|im_end|>", "stone<|im_end|>"]
    assert text.index("cedar") < text.index("falcon") < text.index("river")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": TURNS},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"question": "river", "answer": "stone"},
    ],
)
def test_tools_reach_the_template(load, row, tools):
    ((text, trained),) = load({**row, "tools": tools})
    assert text.startswith("TOOLS" + json.dumps([TOOL]))
    assert trained == ["stone<|im_end|>"]


def test_variables_of_a_row_reach_the_template(load):
    template = "{{ mood }}" + CHATML
    ((text, _),) = load(
        {"messages": TALK, "chat_template_kwargs": {"mood": "calm"}}, template=template
    )
    assert text.startswith("calm<|im_start|>")


@pytest.mark.parametrize("switch", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": 0}])
@pytest.mark.parametrize("turns", [TALK, TURNS])
def test_an_answer_of_weight_0_is_shown_and_not_trained(load, turns, switch):
    row = {"messages": [turns[0], {**turns[1], **switch}, turns[0], {**turns[1], "weight": 1}]}
    ((text, trained),) = load(row)
    assert text.count("stone") == 2
    assert trained == ["stone<|im_end|>"]
    assert text.rindex("stone") > text.index("stone")


def test_weight_0_counts_beside_the_templates_own_marks(load):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    cedar = {"role": "assistant", "content": "cedar", "weight": 0}
    ((text, trained),) = load({"messages": [TALK[0], cedar, *TALK]}, template=template)
    assert "cedar<|im_end|>" in text
    assert trained == ["stone<|im_end|>"]


def test_only_the_completion_of_a_conversation_is_trained(load):
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ((text, trained),) = load({"prompt": [*earlier, TALK[0]], "completion": [TALK[1]]})
    assert "assistant\nb<|im_end|>" in text
    assert trained == ["stone<|im_end|>"]


@pytest.mark.parametrize(
    ("said_by", "role"),
    [("human", "user"), ("user", "user"), ("observation", "tool"), ("function_response", "tool")],
)
def test_sharegpts_names_of_those_who_speak(load, said_by, role):
    turns = [TURNS[0], TURNS[1], {"from": said_by, "value": "12"}, {"from": "bard", "value": "b"}]
    ((text, trained),) = load({"conversations": turns})
    assert f"<|im_start|>{role}\n12<|im_end|>" in text
    assert trained == ["stone<|im_end|>", "b<|im_end|>"]


def test_a_turn_of_function_call_is_an_answer_that_calls_a_tool(load):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"name": "depth", "arguments": {"at": 3}}
    turns = [TURNS[0], {"from": "function_call", "value": json.dumps(call)}]
    ((_, trained),) = load({"conversations": turns}, template=template)
    assert trained == [json.dumps(call) + "<|im_end|>"]


REFUSED = [
    ({"messages": TALK, "label": False}, "label is False"),
    ({"prompt": "a", "completion": "b", "label": 0}, "label is 0"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen"),
    ({"messages": TALK, "chosen": TALK}, "preference"),
    ({"messages": TALK, "images": ["sea.png"]}, "images"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TALK[1]]}, "type image"),
    ({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "weight is 0.5"),
    ({"messages": [TALK[0], {**TALK[1], "train": "no"}]}, "train is no"),
    ({"messages": [{**TALK[0], "train": True}, TALK[1]]}, "only the assistant's"),
    ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "nothing to train on"),
    ({"messages": TALK, "weight": 0.3}, "weight of the row"),
    ({"messages": TALK, "functions": [TOOL]}, "give them as tools"),
    ({"messages": TALK, "history": [["a", "b"]]}, "history"),
    ({"messages": TALK, "tools": "[broken"}, "tools must be a list"),
    ({"messages": [SYSTEM, *TALK], "system": "be cedar"}, "two system texts"),
    ({"prompt": "a", "completion": "b", "system": "be amber"}, "system"),
    ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools"),
    ({"prompt": "a", "completion": "b", "context": "c"}, "context"),
    ({"text": "a", "tools": [TOOL]}, "tools"),
    ({"question": "a", "answer": "b", "response": "c"}, "response and answer could both be meant"),
    ({"question": "a", "query": "b", "answer": "c"}, "question and query"),
    ({"question": "a", "answer": {"text": ["b"]}}, "answer is an object"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history must be"),
    ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "text as content"),
    ({"conversations": [TURNS[0], {"from": "function_call", "value": "go"}]}, "JSON with a name"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_would_change_the_meaning_is_refused_with_the_line(load, row, words):
    with pytest.raises(DataError) as caught:
        load(row)
    assert "rows.jsonl:1: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": TURNS}, "messages is missing"),
        ({"messages": TALK, "label": False}, "label is False"),
        ({"messages": None, "text": "a"}, "messages is null"),
    ],
)
def test_a_later_row_is_looked_at_as_the_first(load, row, words):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: ") as caught:
        load({"messages": TALK}, row)
    assert words in str(caught.value)


def test_a_later_row_of_a_richer_kind_is_no_plain_text(load):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*make it messages, the first row's text"):
        load({"text": "a"}, {"text": "a", "messages": TALK})


def test_columns_that_mean_nothing_here_pass(load):
    others = {"id": 3, "source": "web", "images": [], "tools": None, "label": True, "weight": 1}
    assert load({"messages": TALK, **others}) == load({"messages": TALK})


def test_system_and_tools_without_a_chat_template_are_refused(load):
    for more in ({"system": "be amber"}, {"history": [["a", "b"]]}, {"tools": [TOOL]}):
        with pytest.raises(DataError, match="need a chat template"):
            load({"instruction": "a", "output": "b", **more}, template=None)


# data.columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "trained"),
    [
        ({"q": "a", "reply": "b"}, {"prompt": "q", "completion": "reply"}, "b"),
        ({"question": "a", "reply": "b"}, {"prompt": "question", "completion": "reply"}, "b"),
        ({"question": "a", "answer": "x", "reply": "b"}, {"answer": "reply"}, "b"),
        (
            {"frage": "a", "about": "c", "output": "b"},
            {"instruction": "frage", "input": "about"},
            "b",
        ),
        ({"chat": TALK, "text": "no"}, {"messages": "chat"}, "stone"),
        ({"content": "b", "messages": "no"}, {"text": "content"}, "b"),
        ({"messages": TALK, "persona": "be amber"}, {"system": "persona"}, "stone"),
    ],
)
def test_columns_map_the_files_names(load, row, columns, trained):
    ((text, found),) = load(row, columns=columns)
    assert found == [trained + "<|im_end|>"]
    assert ("persona" not in row) or "be amber" in text
    assert ("about" not in row) or "a\n\nc<|im_end|>" in text


def test_a_prompt_by_another_name_is_taken_as_it_stands(load):
    columns = {"prompt": "question", "completion": "reply"}
    row = {"question": "a ", "reply": "b", "context": "c"}
    assert load(row, columns=columns) == [("a b<|im_end|>", ["b<|im_end|>"])]


def test_a_column_that_is_not_there_is_named(load):
    with pytest.raises(DataError, match=r"columns\.completion = 'reply'.*the first row's: a, q"):
        load({"q": "x", "a": "y"}, columns={"prompt": "q", "completion": "reply"})


def _recipe(**data):
    return Recipe.from_dict(
        {"model": {"path": "~/m"}, "data": {"path": "~/d.jsonl", **data},
         "train": {"output_dir": "~/run"}}
    )  # fmt: skip


def test_columns_in_the_recipe():
    recipe = _recipe(columns={"prompt": "question", "completion": "reply"})
    assert recipe.data.columns == {"prompt": "question", "completion": "reply"}
    with pytest.raises(RecipeError, match=r"'promt'.*'prompt'"):
        _recipe(columns={"promt": "question"})


def test_home_in_the_recipes_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = _recipe(eval_path="~/e.jsonl")
    found = [recipe.model.path, recipe.data.path, recipe.data.eval_path, recipe.train.output_dir]
    assert found == [str(tmp_path / name) for name in ("m", "d.jsonl", "e.jsonl", "run")]


# Files -----------------------------------------------------------------------------------------

LINES = '{"text": "a"}\n{"text": "\u00fc"}\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", LINES.encode()),
        ("rows.ndjson", LINES.encode()),
        ("rows.json", LINES.encode()),
        ("rows.JSONL", LINES.encode()),
        ("rows.JSON", b'\n[{"text": "a"}, {"text": "\\u00fc"}]'),
        ("rows.jsonl", b'[{"text": "a"},\n{"text": "\\u00fc"}]'),
        ("rows.json", b'{\n "text": "a"\n}\n{\n "text": "\\u00fc"\n}'),
        ("rows.jsonl", LINES.encode("utf-8-sig")),
        ("rows.json", LINES.encode("utf-16")),
        ("rows.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("rows.CSV", "text\r\na\r\n\u00fc\r\n".encode("utf-8-sig")),
        ("rows.csv", "text\na\n\u00fc\n".encode("utf-16")),
    ],
)
def test_a_file_is_read_as_people_write_it(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    tokenizer = byte_tokenizer()
    examples = load_examples(tmp_path / name, tokenizer, 100)
    assert [said(row, tokenizer) for row in examples.rows] == [["a</s>"], ["\u00fc</s>"]]


def test_home_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(LINES)
    assert len(load_examples("~/rows.jsonl", byte_tokenizer(), 100)) == 2


@pytest.mark.parametrize("command", [["inspect", "adapter"], ["verify"], ["train"]])
def test_home_in_a_commands_path(command, tmp_path, monkeypatch, capsys):
    from lorax.cli import main

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["lorax", *command, "~/none"])
    with pytest.raises(SystemExit):
        main()
    assert f"error: {tmp_path / 'none'}: " in capsys.readouterr().err.replace("\n", "")
