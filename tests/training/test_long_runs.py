"""R22: 2,000 steps, with evaluations, checkpoints and rotation, leave the process as it was.

LORAX_LONG_STEPS shortens the run.
"""

import gc
import os
import threading

import psutil
import pytest
import torch
from oracles import llama
from runs import make_folder, recipe
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.training import loop
from lorax.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("LORAX_LONG_STEPS", "2000"))
WARM = STEPS // 4  # allocators and caches have settled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("long"))
    tokenizer = byte_tokenizer()
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    llama(vocab_size=tokenizer.vocab_size, **tiny, **heads).save_pretrained(folder / "model")
    write_tokenizer(tokenizer, folder / "model")
    return folder


def state():
    """What may grow: objects on the heap, open handles, threads, resident bytes."""
    gc.collect()
    process = psutil.Process()
    return {
        "tensors": sum(isinstance(found, torch.Tensor) for found in gc.get_objects()),
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "python threads": threading.active_count(),
        "bytes": process.memory_info().rss,
    }


def test_2000_steps_without_growth(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "draw_loss", lambda lines, path, warn: None)
    seen = {}

    def look(line, model):
        if line["step"] in (WARM, STEPS) and "loss" in line:
            seen[line["step"]] = state()

    every = max(1, STEPS // 20)
    changes = {
        "train.max_steps": STEPS,
        "train.save_steps": every,
        "train.eval_steps": every,
        "train.keep_checkpoints": 2,
        "train.batch_size": 1,
        "train.micro_batch_size": 1,
        "data.eval_fraction": 0.05,
    }
    adapter = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    lorax.train(recipe(folder, tmp_path / "run", adapter, **changes), callbacks=[look])
    first, last = seen[WARM], seen[STEPS]
    for name in ("tensors", "handles", "threads", "python threads"):
        assert last[name] <= first[name], (name, first, last)
    # A line of metrics is kept for the picture: 1 kB a step at most; and 1 % of what is resident.
    allowed = 0.01 * first["bytes"] + 1024 * (STEPS - WARM)
    assert last["bytes"] - first["bytes"] <= allowed, (first, last)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    assert newest_checkpoint(tmp_path / "run/checkpoints") is not None
