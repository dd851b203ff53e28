"""`lorax generate --prompts`: each row gets what the command gives it alone; errors are a line."""

import json

import pytest
import torch
from command_line import complete_lorax, run_lorax
from oracles import llama
from tiny_tokenizer import CHATML, byte_tokenizer
from transformers import AutoTokenizer

import lorax
from lorax.data.prompts import read_prompts
from lorax.errors import DataError, UsageError
from lorax.formats.tokenizer_files import write_tokenizer

SHORT = ("--max-new-tokens", 6)
TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models with the same weights: one with a chat template, one without."""
    root = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    for name, template in (("chat", CHATML), ("plain", None)):
        tokenizer = byte_tokenizer(chat_template=template)
        torch.manual_seed(0)
        llama(vocab_size=tokenizer.vocab_size).save_pretrained(root / name)
        write_tokenizer(tokenizer, root / name)
    return root


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


SHAREGPT = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Why?"}]
TEXTS = ["What is it?", "a", "Say something longer, please: ü.", "b" * 40, "Why?"]


@pytest.mark.parametrize("more", [(), ("--raw",), ("--temperature", 1, "--seed", 3)], ids=str)
def test_each_prompt_gets_the_answer_that_it_gets_alone(folder, tmp_path, more):
    file = write(tmp_path / "p.jsonl", *({"prompt": text} for text in TEXTS))
    alone = [run_lorax("generate", folder / "chat", t, *SHORT, *more)[:-1] for t in TEXTS]
    for size in (1, 3, 8):
        how = ("--prompts", file, "--batch-size", size, *SHORT, *more)
        found = lines(run_lorax("generate", folder / "chat", *how))
        assert found == [
            {"prompt": text, "completion": answer}
            for text, answer in zip(TEXTS, alone, strict=True)
        ]


def test_the_forms_of_rows_are_what_transformers_template_makes_of_them(folder, tmp_path):
    file = write(
        tmp_path / "p.jsonl",
        {"messages": TURNS},
        {"conversations": SHAREGPT},
        {"prompt": TURNS, "completion": [{"role": "assistant", "content": "no"}]},
        {"prompt": "Why?", "system": "Be short."},
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"question": "Add\n\n1 and 2", "answer": "3"},
    )  # fmt: skip
    tokenizer = lorax.load_tokenizer(folder / "chat")
    found = [prompt.ids for prompt in read_prompts(file, tokenizer)]
    theirs = AutoTokenizer.from_pretrained(folder / "chat")

    def rendered(messages):
        return theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    asked = rendered([{"role": "user", "content": "Add\n\n1 and 2"}])
    assert found == [rendered(TURNS)] * 4 + [asked] * 2


def test_without_a_template_a_prompt_stands_and_an_instruction_is_in_alpacas_words(
    folder, tmp_path
):
    tokenizer = lorax.load_tokenizer(folder / "plain")
    rows = [{"prompt": "Why?"}, {"instruction": "Add", "input": "1 and 2"}, {"instruction": "Go"}]
    found = read_prompts(write(tmp_path / "p.jsonl", *rows), tokenizer)
    texts = [tokenizer.decode(prompt.ids) for prompt in found]
    assert texts[0] == "Why?"
    assert texts[1].endswith("### Instruction:\nAdd\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert texts[2].endswith("### Instruction:\nGo\n\n### Response:\n")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "columns ['text'] hold no prompt"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "no"}]}, "is the assistant's"),
        ({"conversations": [{"from": "gpt", "value": "no"}]}, "is the assistant's"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "must have a role"),
        ({"prompt": 5}, "prompt is a number; expected a text"),
        ({"prompt": "a", "chosen": "b"}, "column chosen"),
        ({"prompt": "a", "images": ["x.png"]}, "column images"),
        ({"prompt": "x" * 300}, "tokens; expected 1 to 255"),
        ([1], "expected an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_row_that_cannot_be_used_names_file_and_line(folder, tmp_path, row, said):
    file = write(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    done = complete_lorax("generate", folder / "chat", "--prompts", file, *SHORT)
    assert done.returncode in (2, 4)
    assert done.stdout == ""
    assert said in done.stderr
    assert f"{file}:2: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_messages_without_a_template_are_refused(folder, tmp_path):
    file = write(tmp_path / "p.jsonl", {"messages": TURNS})
    for model, raw in (("plain", False), ("chat", True)):
        tokenizer = lorax.load_tokenizer(folder / model)
        with pytest.raises(DataError, match=r"p\.jsonl:1: a conversation.*chat template"):
            read_prompts(file, tokenizer, raw)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "an argument PROMPT or --prompts"),
        (("hi", "--prompts", "FILE"), "one of them only"),
        (("--prompts", "gone.jsonl"), "gone.jsonl"),
        (("--prompts", "FILE", "--batch-size", 0), "batch-size"),
    ],
)
def test_a_users_mistakes(folder, tmp_path, arguments, said):
    file = write(tmp_path / "p.jsonl", {"prompt": "a"})
    given = [file if a == "FILE" else a for a in arguments]
    done = complete_lorax("generate", folder / "chat", *given)
    assert done.returncode in (2, 3, 4)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_several_prompts_from_python(folder):
    model = lorax.load_model(folder / "plain")
    tokenizer = lorax.load_tokenizer(folder / "plain")
    alone = [lorax.generate(model, tokenizer, text, max_new_tokens=6) for text in TEXTS]
    assert lorax.generate(model, tokenizer, TEXTS, max_new_tokens=6, batch_size=2) == alone
    assert lorax.generate(model, tokenizer, [], max_new_tokens=6) == []
    with pytest.raises(UsageError, match=r"^prompt 2: the prompt has 0 tokens"):
        lorax.generate(model, tokenizer, ["a", "", "b"])
    with pytest.raises(UsageError, match="batch_size 0"):
        lorax.generate(model, tokenizer, TEXTS, batch_size=0)
