"""A training step of SmolLM2-135M, lorax against PEFT + transformers (+ bitsandbytes), on a CPU.

    python benchmarks/training_step.py                      all eight cases, some ten minutes
    python benchmarks/training_step.py --case "qlora bfloat16 4x128"    one, or more, of them

The results file keeps each case with the machine, the commit and the steps it was measured with,
and a run replaces the cases that it measures.

A step is what a training loop does: forward, loss over all tokens, backward, clipping, AdamW
(torch's fused one, on both sides). LoRA with r = 16 on every Linear; QLoRA over NF4 with double
quantization. The floor is the time of the frozen matrix products alone: x W^T and dy W of every
Linear and of the head, dense, in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import sides
import torch

import lorax
from lorax.demo import smollm2_path
from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss

CASES = [
    f"{method} {dtype} {shape}"
    for method in ("lora", "qlora")
    for dtype in ("float32", "bfloat16")
    for shape in ("4x128", "2x512")
]
VOCABULARY = 49152
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def tokens(shape: str) -> torch.Tensor:
    rows, length = (int(n) for n in shape.split("x"))
    return torch.randint(17, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def optimizing(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def lorax_side(
    method: str, dtype: str, shape: str, folder: str, fast: bool = True
) -> Callable[[], None]:
    quantization = "nf4-dq" if method == "qlora" else None
    model = lorax.load_model(folder, dtype, quantization=quantization)
    lorax.add_adapter(model, lorax.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    ids = tokens(shape)
    count = ids[:, 1:].numel()

    def loss() -> torch.Tensor:
        with accelerated(model, fast):
            return summed_loss(model, ids, ids) / count

    return optimizing(model, loss)


def plain_side(method: str, dtype: str, shape: str, folder: str) -> Callable[[], None]:
    return lorax_side(method, dtype, shape, folder, fast=False)


def peft_side(method: str, dtype: str, shape: str, folder: str) -> Callable[[], None]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from peft import LoraConfig, get_peft_model

    compute = getattr(torch, dtype)
    options = {}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=compute, **options)
    base.config.use_cache = False
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    ids = tokens(shape)
    return optimizing(model, lambda: model(input_ids=ids, labels=ids).loss)


def floor_side(method: str, dtype: str, shape: str, folder: str) -> Callable[[], None]:
    model = lorax.load_model(folder, dtype)
    rows = tokens(shape).numel()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {
        n: torch.randn(rows, n).to(weights[0].dtype) for n in {s for w in weights for s in w.shape}
    }

    def step() -> None:
        with torch.no_grad():
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
                inputs[weight.shape[0]] @ weight

    return step


SIDES = {"lorax": lorax_side, "plain": plain_side, "peft": peft_side, "floor": floor_side}


def measure(case: str, folder: str, steps: int) -> dict[str, float]:
    both = [sides.Side(__file__, name, "--case", case, "--folder", folder) for name in SIDES]
    found = sides.compare(both, warm=2, steps=steps)
    ours, plain, theirs, floor = (found[name]["seconds"] for name in SIDES)
    return {
        "lorax_seconds": ours,
        "plain_seconds": plain,
        "peft_seconds": theirs,
        "floor_seconds": floor,
        "times_as_fast": theirs / ours,
        "times_the_floor": ours / floor,
        "lorax_peak_bytes": found["lorax"]["peak_bytes"],
        "peft_peak_bytes": found["peft"]["peak_bytes"],
        "memory_ratio": found["lorax"]["peak_bytes"] / found["peft"]["peak_bytes"],
    }


def keep(case: str, result: dict[str, float], steps: int) -> None:
    """Put a case into the results file, in the cases' order."""
    path = sides.RESULTS / "training_step-cpu.json"
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}
    cases[case] = {**result, "steps": steps, "machine": sides.machine(*PACKAGES)}
    sides.write_results("training_step-cpu", {"cases": {c: cases[c] for c in CASES if c in cases}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        sides.serve(SIDES[options.side](*options.case[0].split(), options.folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "smollm2")
        lorax.save_model(lorax.load_model(smollm2_path()), folder)
        for case in options.case or CASES:
            r = measure(case, folder, options.steps)
            keep(case, r, options.steps)
            print(
                f"{case:24} lorax {r['lorax_seconds']:.2f} s  PEFT {r['peft_seconds']:.2f} s  "
                f"{r['times_as_fast']:.2f} times as fast  {r['times_the_floor']:.2f} times the "
                f"floor  memory {r['lorax_peak_bytes'] / 1e9:.2f} / "
                f"{r['peft_peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
