"""A tiny Llama with 40 rows, and recipes over it: five steps an epoch."""

import json

import pytest
import torch
from oracles import llama
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.formats.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, and 40 rows of prompts and completions."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "model")
    write_tokenizer(tokenizer, folder / "model")
    rows = [
        {"prompt": f"say {'a' * (i % 7 + 1)} ", "completion": "b" * (i % 5 + 1)} for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, output, adapter=None, **overrides):
    values = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "adapter": adapter or {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"path": str(folder / "rows.jsonl"), "eval_fraction": 0.2},
        "train": {
            "output_dir": str(output),
            "batch_size": 8,
            "micro_batch_size": 3,
            "learning_rate": 5e-3,
            "epochs": 2,
        },
    }
    return lorax.Recipe.from_dict(values, overrides)
