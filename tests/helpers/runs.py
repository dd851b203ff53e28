"""A tiny model with rows, recipes over it, and what two runs must have in common."""

import json

import torch
from oracles import llama
from safetensors.torch import load_file
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.training.loop import Listener


def make_folder(folder):
    """A tiny Llama with its tokenizer, and 24 rows of other lengths each."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "model")
    write_tokenizer(tokenizer, folder / "model")
    rows = [
        {"prompt": f"say {'a' * (i % 7 + 1)} ", "completion": "b" * (i % 5 + 1)} for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, output, adapter=None, **overrides):
    """Six steps in two epochs, 8, 8 and 3 rows in micro-batches of 3; a checkpoint every 2."""
    values = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "adapter": adapter or {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
        "data": {"path": str(folder / "rows.jsonl"), "eval_fraction": 0.2},
        "train": {
            "output_dir": str(output),
            "batch_size": 8,
            "micro_batch_size": 3,
            "learning_rate": 5e-3,
            "max_steps": 6,
            "save_steps": 2,
            "eval_steps": 4,
        },
    }
    return lorax.Recipe.from_dict(values, overrides)


class Killed(Exception):
    """Stands for a process that ends without a word."""


class KillAt(Listener):
    """Ends the run behind the line of a step."""

    def __init__(self, step):
        self.step = step

    def measured(self, line):
        if line["step"] == self.step and "loss" in line:
            raise Killed


def same(first, second):
    """Whether two runs' directories hold the same metrics, times aside, and the same result."""
    lines = []
    for directory in (first, second):
        text = (directory / "metrics.jsonl").read_text().splitlines()
        lines.append([{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in text])
    assert lines[0] == lines[1]
    result = "adapter" if (first / "adapter").is_dir() else "model"
    (name,) = [p.name for p in (first / result).glob("*.safetensors")]
    one, two = (load_file(directory / result / name) for directory in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
