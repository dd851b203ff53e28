"""The LoRA family on SmolLM2-135M and a CPU: what a step costs, what it learns, what DoRA adds.

    python benchmarks/variants.py                       all of it: an hour or more
    python benchmarks/variants.py --part dora           DoRA's step over LoRA's, here and in PEFT
    python benchmarks/variants.py --part training       each variant trained, --steps of them
    python benchmarks/variants.py --part training --variant DoRA --variant rsLoRA

dora: lorax's LoRA and DoRA and PEFT's LoRA and DoRA in four processes, on one batch of 4 x 128
tokens, interleaved; r = 16 on every Linear, forward, loss, backward, clipping, fused AdamW.

training: each variant is a recipe that `lorax.train` runs in a process of its own on the demo's
data: the same rows in the same order, the same number of steps. The processes of a group take
their optimizer steps in turn, and LoRA runs in every group, so that a noisy machine is noisy for
both; times are given over LoRA's of the same group, step by step, and the median taken. A variant
that this lorax refuses is written down as missing, with its reason.

The results file is benchmarks/results/variants-cpu.json, its picture variants-cpu.png; a run
replaces what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sides
import torch
import training_step

import lorax
from lorax.data.docstrings import write_pairs
from lorax.demo import smollm2_path
from lorax.errors import LoraxError
from lorax.training.loop import Listener, Plan
from lorax.training.loss import summed_loss
from lorax.training.recipe import Recipe

NAME = "variants-cpu"
PACKAGES = ("torch", "transformers", "peft")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 4
LORA = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS}

# What differs from the recipe below, by key. Adding a variant is adding a line.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": LORA},
    "rsLoRA": {"adapter": {**LORA, "use_rslora": True}},
    "DoRA": {"adapter": {**LORA, "use_dora": True}},
    "LoRA+": {"adapter": LORA, "train.lora_plus_ratio": 16},
    "lora_bias": {"adapter": {**LORA, "lora_bias": True}},
    "LoRA, embedding too": {"adapter": {**LORA, "target_modules": [*LINEARS, "embed_tokens"]}},
    "PiSSA": {"adapter": {**LORA, "init_lora_weights": "pissa"}},
    "OLoRA": {"adapter": {**LORA, "init_lora_weights": "olora"}},
    "QLoRA": {"adapter": LORA, "model.quantization": "nf4"},
    "LoftQ": {
        "adapter": {
            **LORA,
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 5},
        }
    },
    "AdaLoRA": {
        "adapter": {
            "method": "adalora",
            "init_r": 24,
            "target_r": 16,
            "lora_alpha": 32,
            "target_modules": LINEARS,
        }
    },
    "prompt tuning": {
        "adapter": {"method": "prompt-tuning", "num_virtual_tokens": 20},
        "train.learning_rate": 3e-2,
    },
    "full": {"adapter": {"method": "full"}, "train.learning_rate": 1e-4},
}


def recipe(variant: str, folder: Path, output: Path, steps: int) -> Recipe:
    """The demo's recipe with a float32 base, and what the variant changes of it."""
    plain = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "path": str(folder / "data" / "train.jsonl"),
            "eval_path": str(folder / "data" / "held-out.jsonl"),
            "max_length": 128,
        },
        "train": {
            "output_dir": str(output),
            "max_steps": steps,
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "learning_rate": 1e-3,
            "warmup_ratio": 0.1,
        },
    }
    return Recipe.from_dict(plain, VARIANTS[variant], where=variant)


# --- a variant's process: lorax.train, held at every step until the parent asks for it -----------


class Stepwise(Listener):
    """Trains a step for each line that comes in, and answers with its seconds."""

    def planned(self, plan: Plan) -> None:
        answer({"trainable": plan.trainable, "learning_rate": plan.recipe.train.learning_rate})
        self._wait()

    def measured(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            answer({"seconds": time.perf_counter() - self._started})
            self._wait()

    def _wait(self) -> None:
        sys.stdin.readline()
        self._started = time.perf_counter()


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


def train_side(variant: str, folder: Path, steps: int) -> None:
    output = folder / "runs" / variant.replace(" ", "-")
    try:
        chosen = recipe(variant, folder, output, steps)
        run = lorax.train(chosen, Stepwise())
    except LoraxError as error:
        answer({"missing": str(error)})
        return
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer({"peak_bytes": peak, "eval_loss_before": losses[0], "eval_loss": losses[-1]})


class Training(sides.Side):
    """A variant's process, seen from the parent."""

    def ready(self) -> None:
        self.start = self._answer()


def train_together(names: list[str], folder: Path, steps: int) -> dict[str, dict[str, Any]]:
    """One group's variants, step by step in turn; {variant: what was found}."""
    where = ("--folder", str(folder), "--steps", str(steps))
    runs = [Training(__file__, f"train {name}", *where) for name in names]
    found: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        run.ready()
        if "missing" in run.start:
            run.process.wait()
            found[name] = run.start
            print(f"{name}: MISSING, {run.start['missing']}", flush=True)
    going = {n: run for n, run in zip(names, runs, strict=True) if n not in found}
    for _ in range(steps):
        for run in going.values():
            run.step()
    warm = min(3, steps - 1)  # the first step's time has the first evaluation in it
    reference = going["LoRA"].seconds[warm:]
    for name, run in going.items():
        seconds = run.seconds[warm:]
        over = [one / other for one, other in zip(seconds, reference, strict=True)]
        found[name] = {
            **run.start,
            **run.finish(),
            "seconds": statistics.median(seconds),
            "over_lora": statistics.median(over),
        }
    return found


def training(
    folder: Path, variants: list[str], steps: int, at_once: int, held_out: int | None
) -> None:
    """Measure every variant, in groups of `at_once` processes, LoRA in each; kept by group."""
    train_file, held_out_file = write_pairs(folder / "data")
    first_rows(train_file, 10 * BATCH * steps)  # reading them costs each process as much as a step
    evaluated = first_rows(held_out_file, held_out)
    measured = {"steps": steps, "held_out_rows": evaluated, "machine": sides.machine(*PACKAGES)}
    others = [name for name in variants if name != "LoRA"]
    groups = [others[i : i + at_once - 1] for i in range(0, len(others), at_once - 1)] or [[]]
    first: dict[str, Any] = {}
    for number, group in enumerate(groups):
        inside = folder / f"group-{number}"
        inside.mkdir()
        for shared in ("model", "data"):
            (inside / shared).symlink_to(folder / shared)
        found = train_together(["LoRA", *group], inside, steps)
        first = first or found["LoRA"]
        for name, result in found.items():
            if "missing" not in result:
                print(f"{name:20} {describe(result)}", flush=True)
        found["LoRA"] = first  # of the first group, whatever the others say
        keep("training", {n: {**result, **measured} for n, result in found.items()}, [*VARIANTS])


def first_rows(file: Path, count: int | None) -> int:
    """Keep the file's first rows; how many there are then."""
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    file.write_text("".join(rows), encoding="utf-8")
    return len(rows)


def describe(result: dict[str, Any]) -> str:
    return (
        f"{result['seconds']:.2f} s a step, {result['over_lora']:.2f} of LoRA's, "
        f"{result['peak_bytes'] / 1e9:.2f} GB, {result['trainable']:,} parameters, held-out loss "
        f"{result['eval_loss_before']:.3f} -> {result['eval_loss']:.3f}"
    )


# --- DoRA over LoRA, in lorax and in PEFT --------------------------------------------------------


def lorax_side(use_dora: bool, dtype: str, quantization: str | None, folder: str) -> Any:
    model = lorax.load_model(folder, dtype, quantization=quantization)
    lorax.add_adapter(model, lorax.LoRAConfig(**LORA, use_dora=use_dora))
    ids = training_step.tokens("4x128")
    count = ids[:, 1:].numel()
    return training_step.optimizing(model, lambda: summed_loss(model, ids, ids) / count)


def peft_side(use_dora: bool, dtype: str, quantization: str | None, folder: str) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from peft import LoraConfig, get_peft_model

    compute, options = getattr(torch, dtype), {}
    if quantization is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=compute, **options)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(**LORA, use_dora=use_dora, task_type="CAUSAL_LM"))
    ids = training_step.tokens("4x128")
    return training_step.optimizing(model, lambda: model(input_ids=ids, labels=ids).loss)


DORA_SIDES: dict[str, tuple[Callable[..., Any], bool]] = {
    "lorax lora": (lorax_side, False),
    "lorax dora": (lorax_side, True),
    "peft lora": (peft_side, False),
    "peft dora": (peft_side, True),
}
BASES: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "nf4-dq, bfloat16": ("bfloat16", "nf4-dq"),
}


def dora(folder: Path, bases: list[str], steps: int) -> dict[str, Any]:
    """{base: seconds and peak bytes of the four sides, and the two ratios}"""
    found = {}
    for base in bases:
        where = ("--base", base, "--folder", str(folder / "model"))
        four = [sides.Side(__file__, name, *where) for name in DORA_SIDES]
        result = sides.compare(four, warm=2, steps=steps)
        ratios = {}
        for program in ("lorax", "peft"):
            plain, changed = (
                next(side.seconds for side in four if side.name == f"{program} {method}")
                for method in ("lora", "dora")
            )
            over = [one / other for one, other in zip(changed, plain, strict=True)]
            ratios[f"{program}_dora_over_lora"] = statistics.median(over)
        found[base] = {
            **ratios,
            "sides": result,
            "steps": steps,
            "machine": sides.machine(*PACKAGES, "bitsandbytes"),
        }
        print(
            f"{base:18} DoRA / LoRA: lorax {ratios['lorax_dora_over_lora']:.2f}, "
            f"PEFT {ratios['peft_dora_over_lora']:.2f}   "
            + "  ".join(f"{name} {r['seconds']:.2f} s" for name, r in result.items()),
            flush=True,
        )
    return found


# --- the results file and its picture ------------------------------------------------------------


def keep(part: str, found: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """Put one part's results into the file, in the tables' order."""
    path = sides.RESULTS / f"{NAME}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    merged = {**content.get(part, {}), **found}
    content[part] = {name: merged[name] for name in order if name in merged}
    sides.write_results(NAME, content)
    return content


def draw(variants: dict[str, Any], path: Path) -> None:
    """Held-out loss over the time of a step, a dot for each variant; its area is its parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = {name: v for name, v in variants.items() if "missing" not in v}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    markers = "osD^v<>Ph*X"
    for number, (name, v) in enumerate(there.items()):
        size = min(30 + v["trainable"] / 4e4, 900)
        at = (v["over_lora"], v["eval_loss"])
        axes.scatter(*at, s=size, alpha=0.7, label=name, marker=markers[number % len(markers)])
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    steps = sorted({v["steps"] for v in there.values()})
    axes.set_xlabel("time of a step, of LoRA's")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.set_title(f"SmolLM2-135M, {' or '.join(map(str, steps))} steps on the demo's data")
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("dora", "training"), action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="LoRA comes along")
    parser.add_argument("--base", choices=BASES, action="append", help="for --part dora")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--timed-steps", type=int, default=9, help="of --part dora")
    parser.add_argument("--held-out", type=int, help="rows to evaluate on, all if not given")
    parser.add_argument("--at-once", type=int, default=4, help="processes in a group, 2 or more")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side and options.side.startswith("train "):
        train_side(options.side.removeprefix("train "), Path(options.folder), options.steps)
        return
    if options.side:
        make, use_dora = DORA_SIDES[options.side]
        sides.serve(make(use_dora, *BASES[options.base[0]], options.folder))
        return
    if options.steps < 2 or options.at_once < 2:
        parser.error("--steps and --at-once are 2 or more")
    parts = options.part or ["dora", "training"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, tokenizer = lorax.load_model(smollm2_path()), lorax.load_tokenizer(smollm2_path())
        lorax.save_model(model, folder / "model", tokenizer=tokenizer)
        del model
        if "dora" in parts:
            keep("dora", dora(folder, options.base or list(BASES), options.timed_steps), [*BASES])
        if "training" in parts:
            chosen = options.variant or list(VARIANTS)
            training(folder, chosen, options.steps, options.at_once, options.held_out)
            content = json.loads((sides.RESULTS / f"{NAME}.json").read_text())
            draw(content["training"], sides.RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
