"""From a row to token ids and a mask by position; from examples to batches."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, SPECIAL, byte_tokenizer, llama2_tokenizer, said

from lorax.data.batches import IGNORED, epoch_order, micro_batches, pad, step_batches
from lorax.data.examples import (
    ALPACA_WITH_INPUT,
    ALPACA_WITHOUT_INPUT,
    Example,
    load_examples,
)
from lorax.errors import DataError, EnvironmentProblem, FormatError

BOS, EOS, PAD, IM_START, IM_END = range(len(SPECIAL))
CONVERSATION = [
    {"role": "system", "content": "brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
MARKED = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
)


@pytest.fixture
def load(tmp_path):
    """Write rows as jsonl, load them."""

    def load_rows(*rows, tokenizer, max_length=10_000):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_examples(path, tokenizer, max_length)

    return load_rows


def one(examples) -> Example:
    (row,) = examples.rows
    return row


def ids_of(text: str) -> list[int]:
    """What the byte tokenizer must give: special tokens by name, else bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = {letter: n for n, letter in enumerate(sorted(ByteLevel.alphabet()))}
    visible = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = [byte for byte in range(256) if byte not in visible]
    visible |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    ids = []
    while text:
        special = next((token for token in SPECIAL if text.startswith(token)), None)
        piece = special or text[0]
        if special:
            ids.append(SPECIAL.index(special))
        else:
            ids += [len(SPECIAL) + letters[visible[byte]] for byte in piece.encode()]
        text = text[len(piece) :]
    return ids


def masked(*pieces: tuple[str, bool]) -> Example:
    """The example that these pieces must become."""
    ids, trained = [], []
    for text, is_trained in pieces:
        part = ids_of(text)
        ids += part
        trained += [is_trained] * len(part)
    return Example(ids, trained)


# Kinds of rows ---------------------------------------------------------------------------------


def test_prompt_completion_trains_the_completion_and_the_end_token(load):
    row = {"prompt": "What? ", "completion": "\u00fcber"}
    examples = load(row, tokenizer=byte_tokenizer())
    assert examples.kind == "prompt/completion"
    assert one(examples) == masked(("What? ", False), ("\u00fcber</s>", True))


def test_text_trains_everything(load):
    examples = load({"text": "abc"}, tokenizer=byte_tokenizer())
    assert examples.kind == "text"
    assert one(examples) == masked(("abc</s>", True))
    assert one(examples).tokens == 3  # the first one has nothing before it


def test_text_behind_a_bos_token(load):
    examples = load({"text": "abc"}, tokenizer=byte_tokenizer(bos=True))
    assert one(examples) == masked(("<s>", False), ("abc</s>", True))


def test_alpaca_without_input_in_stanfords_words(load):
    for row in (
        {"instruction": "do", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
    ):
        examples = load(row, tokenizer=byte_tokenizer())
        assert examples.kind == "alpaca"
        prompt = ALPACA_WITHOUT_INPUT.format(instruction="do")
        assert one(examples) == masked((prompt, False), ("done</s>", True))


def test_alpaca_with_input_in_stanfords_words(load):
    row = {"instruction": "do {input}", "input": "it {x}", "output": "done"}
    prompt = ALPACA_WITH_INPUT.format(instruction="do {input}", input="it {x}")
    assert one(load(row, tokenizer=byte_tokenizer())) == masked((prompt, False), ("done</s>", True))


def test_alpacas_words_are_stanfords():
    assert ALPACA_WITH_INPUT.format(instruction="A", input="B") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nA\n\n### Input:\nB\n\n### Response:\n"
    )
    assert ALPACA_WITHOUT_INPUT.format(instruction="A") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nA\n\n### Response:\n"
    )


@pytest.mark.parametrize(("context", "question"), [("", "do"), ("it", "do\n\nit")])
def test_alpaca_goes_through_the_chat_template(load, context, question):
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    row = {"instruction": "do", "input": context, "output": "done"}
    assert one(load(row, tokenizer=tokenizer)) == masked(
        (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False),
        ("done<|im_end|>", True),
        ("\n", False),
    )


def test_messages_train_each_answer_through_its_end_token(load):
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    examples = load({"messages": CONVERSATION}, tokenizer=tokenizer)
    assert examples.kind == "messages"
    assert one(examples) == masked(
        (
            "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        ("1<|im_end|>", True),
        ("\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("2<|im_end|>", True),
        ("\n", False),
    )


def test_sharegpt_is_messages_by_other_names(load):
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CONVERSATION]
    examples = load({"conversations": turns}, tokenizer=tokenizer)
    assert examples.kind == "sharegpt"
    assert examples.rows == load({"messages": CONVERSATION}, tokenizer=tokenizer).rows


def test_generation_marks_decide_where_the_template_has_them(load):
    tokenizer = byte_tokenizer(chat_template=MARKED)
    example = one(load({"messages": CONVERSATION[1:]}, tokenizer=tokenizer))
    assert example == masked(
        ("user:one?|assistant:", False),
        ("1</s>", True),
        ("|user:two?|assistant:", False),
        ("2</s>", True),
    )


def test_a_template_that_rewrites_the_past_is_refused_with_the_row(load):
    last_only = "{{ messages[-1].role }}:{{ messages[-1].content }}"
    tokenizer = byte_tokenizer(chat_template=last_only)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*leaves out message 1 \(of system\)"):
        load({"messages": CONVERSATION}, tokenizer=tokenizer)


# The mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_token", [None, "</s>", "<pad>"])
def test_the_end_token_is_trained_even_where_it_is_the_pad_token(load, pad_token):
    tokenizer = byte_tokenizer(pad=pad_token)
    example = one(load({"prompt": "a", "completion": "b"}, tokenizer=tokenizer))
    longer = one(load({"prompt": "a", "completion": "bcdef"}, tokenizer=tokenizer))
    batch = pad([example, longer], tokenizer.pad_token_id)
    assert batch.labels[0].tolist() == [IGNORED, *ids_of("b"), EOS, *[IGNORED] * 4]
    assert batch.input_ids[0, 3:].tolist() == [PAD if pad_token == "<pad>" else EOS] * 4


def test_an_end_token_inside_the_prompt_is_not_trained(load):
    tokenizer = byte_tokenizer(eos="<|im_end|>", pad="<|im_end|>", chat_template=CHATML)
    example = one(load({"messages": CONVERSATION}, tokenizer=tokenizer))
    ends = [
        trained
        for token, trained in zip(example.ids, example.trained, strict=True)
        if token == IM_END
    ]
    assert ends == [False, False, True, False, True]


def test_the_mask_goes_by_position_where_the_answer_stands_in_the_prompt_too(load):
    row = {"prompt": "say yes: yes yes ", "completion": "yes"}
    assert one(load(row, tokenizer=byte_tokenizer())) == masked(
        ("say yes: yes yes ", False), ("yes</s>", True)
    )
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    turns = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]
    example = one(load({"messages": turns * 2}, tokenizer=tokenizer))
    assert said(example, tokenizer) == ["yes<|im_end|>"] * 2
    assert example.trained.index(True) > example.ids.index(IM_END)


def test_nothing_behind_the_end_token_is_trained(load):
    template = CHATML.replace("<|im_end|>\\n'", "<|im_end|>\\n\\n###\\n'")
    tokenizer = byte_tokenizer(eos="<|im_end|>", chat_template=template)
    example = one(load({"messages": CONVERSATION[1:3]}, tokenizer=tokenizer))
    last = max(i for i, trained in enumerate(example.trained) if trained)
    assert example.ids[last] == IM_END
    assert example.trained[last - 1]
    assert len(example.ids) > last + 1


def test_an_end_token_of_the_chat_that_is_not_eos_ends_the_answer_too(load):
    from lorax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(
        byte_tokenizer().backend,
        eos_token="</s>",
        chat_template=CHATML,
        end_token_ids=[IM_END],
    )
    example = one(load({"messages": CONVERSATION[1:3]}, tokenizer=tokenizer))
    last = max(i for i, trained in enumerate(example.trained) if trained)
    assert example.ids[last] == IM_END


def test_a_completion_that_spells_its_end_token_gets_no_second_one(load):
    row = {"prompt": "a", "completion": "b</s>"}
    assert one(load(row, tokenizer=byte_tokenizer())) == masked(("a", False), ("b</s>", True))


def test_there_is_one_bos_token_and_it_is_not_trained(load):
    tokenizer = byte_tokenizer(bos=True)
    example = one(load({"prompt": "a", "completion": "b"}, tokenizer=tokenizer))
    assert example == masked(("<s>a", False), ("b</s>", True))


@pytest.mark.parametrize("row", [{"prompt": "<s>a", "completion": "b"}, {"text": "<s>ab"}])
def test_a_text_that_spells_the_bos_token_gets_no_second_one(load, row):
    example = one(load(row, tokenizer=byte_tokenizer(bos=True)))
    assert example.ids == ids_of("<s>ab</s>")
    assert example.ids == byte_tokenizer(bos=True).encode("<s>ab</s>")


def test_a_chat_template_that_writes_the_bos_token_gets_no_second_one(load):
    tokenizer = byte_tokenizer(bos=True, eos="<|im_end|>", chat_template="{{ bos_token }}" + CHATML)
    example = one(load({"messages": CONVERSATION}, tokenizer=tokenizer))
    assert example.ids.count(BOS) == 1
    assert example.ids[0] == BOS
    assert not example.trained[0]


def test_the_prompt_is_the_one_that_generation_meets(load):
    """A merge across the seam would make other tokens of the prompt than there are in use."""
    tokenizer = byte_tokenizer(merges=((":", "b"),))
    example = one(load({"prompt": "a:", "completion": "b:b"}, tokenizer=tokenizer))
    prompt = tokenizer.encode("a:")
    assert example.ids[: len(prompt)] == prompt
    assert example.trained == [False, False, True, True, True]
    assert tokenizer.decode(example.ids[len(prompt) :]).startswith("b:b")


def test_an_answer_gets_no_space_of_its_own_from_llama2s_tokenizer(load):
    """That tokenizer puts a space before each text; an answer is no text of its own."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = llama2_tokenizer(template)
    turns = CONVERSATION[1:]
    example = one(load({"messages": turns}, tokenizer=tokenizer))
    whole = tokenizer.apply_chat_template(turns)
    assert example.ids == tokenizer.encode(whole, add_special_tokens=False)
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True),
        add_special_tokens=False,
    )
    assert example.ids[: len(prompt)] == prompt


def test_a_completion_gets_no_space_of_its_own_from_llama2s_tokenizer(load):
    tokenizer = llama2_tokenizer()
    example = one(load({"prompt": "a b", "completion": "c"}, tokenizer=tokenizer))
    assert example.ids == tokenizer.encode("a bc</s>")
    assert example.trained == [False] * 5 + [True] * 2


# Length ----------------------------------------------------------------------------------------


def test_a_long_row_is_cut_and_counted(load):
    rows = [{"prompt": "abc", "completion": "defgh"}, {"prompt": "abc", "completion": "d"}]
    examples = load(*rows, tokenizer=byte_tokenizer(), max_length=5)
    assert (examples.truncated, examples.dropped) == (1, 0)
    assert examples.rows[0] == masked(("abc", False), ("de", True))
    assert examples.rows[1] == masked(("abc", False), ("d</s>", True))


def test_a_row_whose_answer_is_cut_away_is_dropped_and_counted(load):
    rows = [{"prompt": "abcdefgh", "completion": "x"}, {"prompt": "a", "completion": "b"}]
    examples = load(*rows, tokenizer=byte_tokenizer(), max_length=5)
    assert (examples.truncated, examples.dropped, len(examples)) == (1, 1, 1)


def test_a_file_with_nothing_to_train_on_is_an_error(load):
    with pytest.raises(DataError, match="no row has anything to train on within 5 tokens"):
        load({"prompt": "abcdefgh", "completion": "x"}, tokenizer=byte_tokenizer(), max_length=5)


def test_an_empty_completion_trains_the_end_token(load):
    example = one(load({"prompt": "a", "completion": ""}, tokenizer=byte_tokenizer()))
    assert example == masked(("a", False), ("</s>", True))


# Files -----------------------------------------------------------------------------------------

ROW = {"prompt": 'a, "b"\nc\u2028d', "completion": "\u00fc\x0c|\x85"}


def test_the_same_rows_from_json_jsonl_and_csv(tmp_path):
    import csv

    rows = [ROW, {"prompt": "x", "completion": "a\u2028b"}, {"prompt": "", "completion": "z"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    found = [
        load_examples(tmp_path / name, byte_tokenizer(), 100)
        for name in ("rows.json", "rows.jsonl", "rows.csv")
    ]
    assert found[0].rows[0] == masked((ROW["prompt"], False), (ROW["completion"] + "</s>", True))
    assert found[0] == found[1] == found[2]


def test_a_long_field_of_a_csv_file_is_read(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(one(load_examples(tmp_path / "rows.csv", byte_tokenizer(), 10**6)).ids) == 200_001


BROKEN = [
    # name, content, line of the fault, words of the message
    ("a.jsonl", '{"text": "a"}\n{"text": \n', 2, "not valid JSON"),
    ("a.jsonl", '{"text": "a"}\n\n[1]\n', 3, "expected an object"),
    ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 2, "text is missing"),
    ("a.jsonl", '{"text": "a"}\n{"text": null}\n', 2, "text is null"),
    ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', 2, "text is a number"),
    ("a.jsonl", '{"txt": "a"}\n', 1, "fit no kind of row"),
    ("a.jsonl", '{"prompt": "a", "completion": ["b"]}\n', 1, "completion is a list"),
    ("a.jsonl", '{"instruction": "a", "input": 3, "output": "b"}\n', 1, "input is a number"),
    ("a.jsonl", '{"instruction": "a", "output": {}}\n', 1, "output is an object"),
    ("a.jsonl", '{"messages": []}\n', 1, "list of role and content"),
    ("a.jsonl", '{"messages": {"role": "user"}}\n', 1, "list of role and content"),
    ("a.jsonl", '{"messages": ["hello"]}\n', 1, "must have a role"),
    ("a.jsonl", '{"messages": [{"role": "king", "content": "a"}]}\n', 1, "must have a role"),
    ("a.jsonl", '{"messages": [{"role": ["user"], "content": "a"}]}\n', 1, "must have a role"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', 1, "text as content"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', 1, "nothing to train on"),
    ("a.jsonl", '{"conversations": "a"}\n', 1, "list of from and value"),
    ("a.jsonl", '{"conversations": [3]}\n', 1, "must have a role"),
    ("a.jsonl", '{"conversations": [{"from": "dog", "value": "a"}]}\n', 1, "from human"),
    ("a.jsonl", '{"conversations": [{"from": "gpt"}]}\n', 1, "text as content"),
    ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
    ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", 2, "not valid JSON"),
    ("a.json", '[{"text": "a"},\n\n{"text": }]', 3, "not valid JSON"),
    ("a.json", '[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', 2, "expected a comma"),
    ("a.json", '[{"text": "a"},\n3]', 2, "expected an object"),
    ("a.json", '[{"text":\n "a"},\n{"text": 3}]', 3, "text is a number"),
    ("a.json", '[{"text": "a"},\n', 2, "not valid JSON"),
    ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', 2, "behind the end of the array"),
    ("a.json", '{"text": "a"}\n{"text": 3}', 2, "text is a number"),
    ("a.json", '{"text": "a"}\n\n{"text" 3}', 3, "not valid JSON"),
    ("a.json", '"text"', 1, "expected an object"),
    ("a.csv", "prompt,completion\na,b\nc\n", 3, "another number of columns"),
    ("a.csv", "prompt,completion\na,b\nc,d,e\n", 3, "another number of columns"),
    ("a.csv", 'prompt,completion\na,"b\n', 2, "not valid CSV"),
    ("a.csv", 'prompt,completion\na,"b"c\n', 2, "not valid CSV"),
    ("a.csv", "left,right\na,b\n", 2, "fit no kind of row"),
]


@pytest.mark.parametrize(("name", "content", "line", "words"), BROKEN)
def test_a_broken_row_is_an_error_with_file_and_line(tmp_path, name, content, line, words):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_examples(path, byte_tokenizer(chat_template=CHATML), 100)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message
    assert isinstance(caught.value, FormatError)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"text\n", "no rows"),
        ("a.jsonl", b'{"text": "\xff"}', "cannot be read"),
        ("a.tsv", b"", "expected a .jsonl, .json, .csv or .parquet file"),
        ("a", b"", "expected a .jsonl, .json, .csv or .parquet file"),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_examples(tmp_path / name, byte_tokenizer(), 100)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"none.jsonl: cannot be read \(No such file"):
        load_examples(tmp_path / "none.jsonl", byte_tokenizer(), 100)


def test_messages_without_a_chat_template_are_an_error_with_the_row(load):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*no chat template"):
        load({"messages": CONVERSATION}, tokenizer=byte_tokenizer())


# Batches ---------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
EXAMPLES = st.lists(
    st.integers(1, 12).map(lambda n: Example(list(range(1, n + 1)), [True] * n)),
    min_size=1,
    max_size=24,
)


@given(EXAMPLES, st.integers(1, 30))
def test_micro_batches_hold_each_row_once(rows, size):
    found = []
    for batch in micro_batches(rows, size, pad_id=0):
        assert batch.input_ids.shape == batch.labels.shape
        assert len(batch.input_ids) <= size
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            assert [
                token for token, label in zip(ids, labels, strict=True) if label != IGNORED
            ] == [label for label in labels if label != IGNORED]
            found.append(max(labels))  # a row of n tokens is 1..n
    assert sorted(found) == sorted(len(row.ids) for row in rows)


@given(EXAMPLES, st.integers(1, 30))
def test_a_micro_batch_is_as_wide_as_its_longest_row(rows, size):
    for batch in micro_batches(rows, size, pad_id=0):
        assert batch.labels.max() == batch.labels.shape[1]


def test_padding_is_on_the_right_and_masked():
    short, long = Example([5, 0], [False, True]), Example([1, 2, 3], [False, False, True])
    batch = pad([short, long], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 0, 0], [1, 2, 3]]
    assert batch.labels.tolist() == [[IGNORED, 0, IGNORED], [IGNORED, IGNORED, 3]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_the_order_is_the_seeds_and_the_epochs():
    orders = {
        (seed, epoch): epoch_order(50, seed, epoch, True) for seed in (0, 1) for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(50, 1, 1, True) == orders[1, 1]
    assert epoch_order(50, 1, 1, False) == list(range(50))


def test_the_order_depends_on_no_other_random_numbers():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = epoch_order(50, 3, 0, True)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert epoch_order(50, 3, 0, True) == first


def test_each_epoch_holds_each_row_once_and_counts_its_share():
    rows = [Example([n], [True]) for n in range(10)]
    steps = list(itertools.islice(step_batches(rows, 4, seed=0, shuffle=True), 6))
    assert [epoch for epoch, _ in steps] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    for batches in (steps[:3], steps[3:]):
        assert sorted(row.ids[0] for _, batch in batches for row in batch) == list(range(10))


@given(EXAMPLES, st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_a_steps_rows_do_not_depend_on_the_micro_batch_size(rows, batch_size, seed):
    steps = list(itertools.islice(step_batches(rows, batch_size, seed, True), 3))
    for _, batch in steps:
        whole = pad(batch, 0).labels
        for size in (1, 2, batch_size):
            cut = [cut.labels for cut in micro_batches(batch, size, 0)]
            assert sum(int((labels != IGNORED).sum()) for labels in cut) == int(
                (whole != IGNORED).sum()
            )
            assert sum(len(labels) for labels in cut) == len(batch)


@given(TEXT, TEXT)
def test_any_text_is_encoded_and_masked_at_its_seam(prompt, completion):
    from lorax.data.examples import Segment, encode

    tokenizer = byte_tokenizer()
    example = encode([Segment(prompt, False), Segment(completion, True)], tokenizer)
    assert example == masked((prompt, False), (completion + "</s>", True))
