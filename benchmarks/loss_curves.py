"""The hand-written step against the plain one over 100 steps of the demo: do the losses agree?

    python benchmarks/loss_curves.py                the whole model, some hours on two cores
    python benchmarks/loss_curves.py --layers 4     SmolLM2 with its first layers only

The demo's data and recipe (QLoRA, r = 16 on every Linear), three seeds, each with and without
`train.fast`. A seed draws the adapter and the order of the rows, so the plain curves of two seeds
differ by what chance makes of the same settings. The two curves of one seed may differ by rounding
alone: their distance has to stay below that of two seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import sides

import lorax
from lorax.data.docstrings import write_pairs
from lorax.demo import demo_recipe, smollm2_path

SEEDS = (0, 1, 2)
Curve = list[float]


def shortened(layers: int, folder: Path) -> str:
    """SmolLM2 with that many layers, as a directory."""
    model, tokenizer = lorax.load_model(smollm2_path()), lorax.load_tokenizer(smollm2_path())
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    model.config = model.model.config = config
    model.model.layers = model.model.layers[:layers]
    lorax.save_model(model, folder / "model", tokenizer=tokenizer)
    return str(folder / "model")


def curve(recipe: lorax.Recipe, seed: int, fast: bool) -> Curve:
    output = f"{recipe.train.output_dir}-{seed}-{'fast' if fast else 'plain'}"
    changes = {"seed": seed, "fast": fast, "output_dir": output}
    run = lorax.train(recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)}))
    return [line["loss"] for line in run.metrics if "loss" in line]


def distance(one: Curve, other: Curve) -> dict[str, float]:
    """How far two curves are from each other: over the steps, and at the worst of them."""
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return {"mean": statistics.fmean(apart), "largest": max(apart)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    curves: dict[str, dict[int, Curve]] = {"fast": {}, "plain": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = shortened(options.layers, folder), write_pairs(folder / "data")
        recipe = demo_recipe(model, *data, folder / "run", options.steps, "float32", "cpu")
        for seed, kind in itertools.product(SEEDS, curves):
            curves[kind][seed] = curve(recipe, seed, kind == "fast")
            print(f"{kind} {seed}: {curves[kind][seed][-1]:.4f}", flush=True)
    plain = curves["plain"]
    result: dict[str, Any] = {
        "layers": options.layers,
        "steps": options.steps,
        "fast_to_plain": {seed: distance(curves["fast"][seed], plain[seed]) for seed in SEEDS},
        "seed_to_seed": {
            f"{a} {b}": distance(plain[a], plain[b]) for a, b in itertools.combinations(SEEDS, 2)
        },
        "curves": curves,
        "machine": sides.machine("torch"),
    }
    sides.write_results("loss_curves-cpu", result)
    for name in ("fast_to_plain", "seed_to_seed"):
        for pair, apart in result[name].items():
            print(f"{name} {pair}: mean {apart['mean']:.2e}, largest {apart['largest']:.2e}")


if __name__ == "__main__":
    main()
