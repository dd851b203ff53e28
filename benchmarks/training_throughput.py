"""Tokens a second and memory on rows of 20 to 512 tokens: lorax beside Trainer and PEFT, on a CPU.

    python benchmarks/training_throughput.py              six sides in turn, some minutes

The same rows, steps and precision on all sides: LoRA with r = 16 on every Linear of a small Llama
in float32, 16 rows in an optimizer step, every token trained; each side's rows in a forward pass
are its default.

    trainer              transformers' Trainer with PEFT: 8 rows in a pass, padded to the longest
    trainer by 4         the same with lorax's 4 rows in a pass
    trainer grouped      8 rows in a pass, of like length
    lorax                padded; lorax sorts a step's rows by length before it cuts micro-batches
    lorax grouped        data.group_by_length
    lorax packed         data.packing

A round is a run of one epoch on each side: its data, an evaluation of 16 more rows before and
after, and a checkpoint at the end; the model is loaded before. Time is the processor's, on one
thread: other programs on the machine do not count. Tokens are the trained rows' own, without
padding. Memory is the process's peak, and what it grew by once the libraries were
there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sides
import torch

import lorax
from lorax.data.examples import load_examples
from lorax.training.loop import Listener
from lorax.training.packing import packing_of
from lorax.training.plan import Plan

ROWS, SHORTEST, LONGEST = 64, 20, 512
HELD_OUT = 16
BATCH, MICRO, TRAINERS = 16, 4, 8
WORDS = 4096
PACKAGES = ("torch", "transformers", "peft", "accelerate")
SIDES = ("trainer", "trainer by 4", "trainer grouped", "lorax", "lorax grouped", "lorax packed")


def make_folder(folder: Path, rows: int = ROWS, layers: int = 4, positions: int = 1024) -> None:
    """A Llama of width 256, a tokenizer of a token a word, and rows of words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    for name, count in (("rows", rows), ("held-out", HELD_OUT)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                length = draw.randint(SHORTEST, LONGEST) - 1  # and the end token
                text = " ".join(f"w{draw.randrange(3, WORDS)}" for _ in range(length))
                file.write(json.dumps({"text": text}) + "\n")


def rows_of(folder: Path, name: str) -> list[list[int]]:
    """The tokens of each row."""
    tokenizer = lorax.load_tokenizer(folder / "model")
    return [row.ids for row in load_examples(folder / f"{name}.jsonl", tokenizer, LONGEST).rows]


def recipe(folder: Path, output: str, **data: Any) -> lorax.Recipe:
    return lorax.Recipe.from_dict(
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "data": {
                "path": str(folder / "rows.jsonl"),
                "eval_path": str(folder / "held-out.jsonl"),
                "max_length": LONGEST,
                **data,
            },
            "train": {
                "output_dir": output,
                "batch_size": BATCH,
                "micro_batch_size": MICRO,
                "eval_steps": ROWS // BATCH,
                "save_steps": ROWS // BATCH,
            },
        }
    )


def lorax_side(folder: Path, name: str) -> Callable[[], float]:
    option = {"grouped": "group_by_length", "packed": "packing"}.get(name.partition(" ")[2])
    data = {option: True} if option else {}

    class Clock(Listener):
        def planned(self, plan: Plan) -> None:
            self.started = time.process_time()

    def epoch() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as output:
            lorax.train(recipe(folder, f"{output}/run", **data), clock)
            return time.process_time() - clock.started

    return epoch


def trainer_side(folder: Path, name: str) -> Callable[[], float]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    base.config.use_cache = False
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    rows, held_out = (
        [{"input_ids": ids, "labels": ids} for ids in rows_of(folder, name)]
        for name in ("rows", "held-out")
    )
    grouped = {"train_sampling_strategy": "group_by_length"} if "grouped" in name else {}
    size = MICRO if name.endswith("by 4") else TRAINERS
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / name.replace(" ", "-")),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size,
        num_train_epochs=1,
        learning_rate=2e-4,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **grouped,
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding="longest")

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.process_time() - self.started

    def epoch() -> float:
        clock = Clock()
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=collator,
            callbacks=[clock],
        )
        trainer.train()
        return clock.seconds

    return epoch


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    both = [sides.Side(__file__, name, "--folder", str(folder)) for name in SIDES]
    found = sides.compare(both, warm=1, steps=rounds)
    rows = load_examples(folder / "rows.jsonl", lorax.load_tokenizer(folder / "model"), LONGEST)
    tokens = sum(len(row.ids) for row in rows.rows)
    for side in found.values():
        side["tokens_per_second"] = tokens / side["seconds"]
    speed = {name: found[name]["tokens_per_second"] for name in SIDES}
    return {
        "rows": len(rows),
        "tokens": tokens,
        "padding_saved": packing_of(recipe(folder, "run"), rows.rows).saved,
        "rounds": rounds,
        "threads": 1,
        "sides": found,
        "packed_over_trainer": speed["lorax packed"] / speed["trainer"],
        "packed_over_trainer_by_4": speed["lorax packed"] / speed["trainer by 4"],
        "packed_over_trainer_grouped": speed["lorax packed"] / speed["trainer grouped"],
        "packed_over_lorax_padded": speed["lorax packed"] / speed["lorax"],
        "machine": sides.machine(*PACKAGES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(1)
        make = trainer_side if options.side.startswith("trainer") else lorax_side
        sides.serve(make(options.folder, options.side))
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_folder(Path(temporary), options.rows)
        found = measure(Path(temporary), options.rounds)
    sides.write_results("training_throughput-cpu", found)
    for name, side in found["sides"].items():
        print(
            f"{name:16} {side['tokens_per_second']:7,.0f} tokens/s  "
            f"peak {side['peak_bytes'] / 1e6:,.0f} MB, grown by {side['grown_bytes'] / 1e6:,.0f}"
        )
    print(
        f"packed: {found['packed_over_trainer']:.2f} times Trainer, "
        f"{found['packed_over_trainer_by_4']:.2f} times Trainer by 4, "
        f"{found['packed_over_trainer_grouped']:.2f} times Trainer grouped, "
        f"{found['packed_over_lorax_padded']:.2f} times lorax padded"
    )


if __name__ == "__main__":
    main()
