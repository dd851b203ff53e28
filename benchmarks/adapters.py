"""Many adapters on one SmolLM2-135M on a CPU: switching, and a batch whose rows have their own.

    python benchmarks/adapters.py

Four adapters of rank 16 on every Linear, written by lorax, are loaded by name in lorax and in PEFT,
each in a process of its own; the two take turns. A step switches to the next adapter
(lorax.use_adapter, PeftModel.set_adapter) and computes one batch of 8 x 32 tokens whose rows have
the four adapters in turn (model(ids, adapters=[...]), and PEFT's adapter_names). Before anything
is timed both sides' logits of that batch are compared. lorax's side also reads an adapter back from
disk, as with a budget, and answers eight prompts together and one at a time.

The results file is benchmarks/results/adapters-cpu.json: medians, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sides
import torch

import lorax
from lorax.demo import smollm2_path

NAME = "adapters-cpu"
PACKAGES = ("torch", "transformers", "peft")
NAMES = ("a", "b", "c", "d")
RANK, ROWS, LENGTH = 16, 8, 32
ANSWER = 24  # tokens
NEAR = 1e-3  # of logits up to 30 in float32, through 30 layers


def batch() -> tuple[torch.Tensor, list[str]]:
    """The tokens, (ROWS, LENGTH), and each row's adapter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 49000, (ROWS, LENGTH), generator=generator)
    return ids, [NAMES[row % len(NAMES)] for row in range(ROWS)]


def write_adapters(folder: Path) -> None:
    """The model, and random adapters, large enough to change what comes out."""
    lorax.save_model(lorax.load_model(smollm2_path(), "float32"), folder / "model")
    model = lorax.load_model(folder / "model", "float32")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = lorax.LoRAConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights="gaussian"
        )
        lorax.add_adapter(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.02)
        lorax.save_adapter(model, folder / name)
        lorax.unload_adapter(model)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def lorax_side(folder: Path) -> Callable[[], dict[str, float]]:
    model = lorax.load_model(folder / "model", "float32")
    for name in NAMES:
        lorax.load_adapter(model, folder / name, name=name)
    ids, names = batch()
    with torch.no_grad():
        torch.save(model(ids, adapters=names), folder / "lorax.pt")
    turn = iter(NAMES * 10000)

    def step() -> dict[str, float]:
        with torch.no_grad():
            switch = seconds(lambda: lorax.use_adapter(model, next(turn)))
            mixed = seconds(lambda: model(ids, adapters=names))
            one = seconds(lambda: model(ids))
        return {"seconds": switch, "mixed_seconds": mixed, "one_adapter_seconds": one}

    return step


def peft_side(folder: Path) -> Callable[[], dict[str, float]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / NAMES[0], adapter_name=NAMES[0]).eval()
    for name in NAMES[1:]:
        model.load_adapter(folder / name, name)
    model.eval()
    ids, names = batch()
    with torch.no_grad():
        torch.save(model(ids, adapter_names=names).logits, folder / "peft.pt")
    turn = iter(NAMES * 10000)

    def step() -> dict[str, float]:
        with torch.no_grad():
            switch = seconds(lambda: model.set_adapter(next(turn)))
            mixed = seconds(lambda: model(ids, adapter_names=names))
            one = seconds(lambda: model(ids))
        return {"seconds": switch, "mixed_seconds": mixed, "one_adapter_seconds": one}

    return step


def alone(folder: Path, repeats: int) -> dict[str, float]:
    """What lorax does beside that: back from disk; eight prompts together and one at a time."""
    from lorax.inference.batch import stream_rows

    model = lorax.load_model(folder / "model", "float32")
    for name in NAMES:
        lorax.load_adapter(model, folder / name, name=name)
    ids, names = batch()
    prompts, counts = ids.tolist(), [ANSWER] * ROWS

    def one_at_a_time() -> list[Any]:
        found = []
        for prompt, name in zip(prompts, names, strict=True):
            with lorax.use_adapter(model, name):
                found.append([t for _, t in stream_rows(model, (), [prompt], [ANSWER])])
        return found

    def together() -> list[Any]:
        found: list[Any] = [[] for _ in prompts]
        for row, token in stream_rows(model, (), prompts, counts, None, ROWS, names):
            found[row].append(token)
        return found

    if together() != one_at_a_time():
        raise SystemExit("prompts together do not get what they get alone; nothing is reported")
    taken: dict[str, list[float]] = {"together": [], "one_at_a_time": [], "from_disk": []}
    for _ in range(repeats):
        taken["together"].append(seconds(together))
        taken["one_at_a_time"].append(seconds(one_at_a_time))
    adapters = lorax.named_adapters(model)
    adapters.budget = 1
    for name in NAMES * repeats:
        taken["from_disk"].append(seconds(lambda name=name: adapters.use(name)))
    return {f"{key}_seconds": statistics.median(values) for key, values in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", choices=["lorax", "peft"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.side:
        sides.serve({"lorax": lorax_side, "peft": peft_side}[options.side](options.folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_adapters(folder)
        both = [sides.Side(__file__, name, "--folder", temporary) for name in ("lorax", "peft")]
        found = sides.compare(both, warm=3, steps=options.steps)
        mine, theirs = (torch.load(folder / f"{name}.pt") for name in ("lorax", "peft"))
        difference = (mine - theirs).abs().max().item()
        if difference > NEAR:
            raise SystemExit(f"logits differ by {difference:.1e}; nothing is reported")
        content = {
            "machine": sides.machine(*PACKAGES),
            "model": "SmolLM2-135M-Instruct, float32",
            "adapters": len(NAMES), "rank": RANK, "rows": ROWS, "tokens_a_row": LENGTH,
            "answer_tokens": ANSWER, "threads": torch.get_num_threads(),
            "largest_difference_of_logits": difference,
            "sides": found,
            "lorax_alone": alone(folder, 3),
        }  # fmt: skip
    print(sides.write_results(NAME, content))
    for name, side in found.items():
        print(f"{name}: switch {1e3 * side['seconds']:.2f} ms, mixed {side['mixed_seconds']:.3f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
