"""`lorax estimate` against the measured peak of a run, each in a process of its own, on a CPU.

    python benchmarks/estimates.py                    all cases, some ten minutes
    python benchmarks/estimates.py --case "small lora adamw 2x512"      one, or more, of them

A case is two optimizer steps of `lorax.train`. Measured is the peak of resident memory, from the
start of the process to its end; predicted is what a process beside it says of the same recipe. The
results file keeps each case, and a run replaces those that it measures. Peak memory does not depend
on what else the machine does. The models are random, of 5 to 50 MB, but for SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import resource
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sides

HELPERS = Path(__file__).parent.parent / "tests" / "helpers"
PACKAGES = ("torch", "numpy")
LLAMA = {"model_type": "llama", "vocab_size": 8192, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "small": LLAMA
    | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "middle": LLAMA
    | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    | {"num_attention_heads": 6, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 8192, "n_embd": 384, "n_layer": 5, "n_head": 6},
}
CASES = [
    "small lora adamw 2x512",
    "small full adamw 2x256",
    "small lora adamw 1x1024",
    "small qlora adamw-8bit 4x256",
    "middle lora adamw 2x256",
    "middle lora adamw 4x128 checkpointing",
    "middle lora adamw 2x512 plain",
    "middle lora adamw 2x256 bfloat16",
    "middle lora paged-adamw 1x1024",
    "middle qlora adamw 2x256",
    "middle qlora adamw-8bit 1x512 checkpointing",
    "middle full adamw 2x128",
    "middle full adamw-8bit 2x256",
    "middle full paged-adamw-8bit 1x512 checkpointing",
    "middle lora adamw 2x256 accumulated",
    "gpt2 lora adamw 2x256",
    "gpt2 lora adamw 1x512 checkpointing",
    "gpt2 full adamw 2x128",
    "gpt2 full adamw-8bit 1x256 accumulated",
    "gpt2 qlora adamw 2x256",
    "smollm2 lora adamw 2x64",
    "smollm2 qlora adamw-8bit 1x128",
    "smollm2 lora adamw 1x256 checkpointing",
    "smollm2 qlora adamw 1x128 plain",
]


def recipe_of(case: str, folder: Path) -> dict[str, Any]:
    """The case's recipe, over the models and rows in `folder`."""
    model, method, optimizer, size, *words = case.split()
    batch, length = (int(number) for number in size.split("x"))
    times = 2 if "accumulated" in words else 1
    settings = {
        "path": str(folder / model),
        "dtype": "bfloat16" if "bfloat16" in words else "float32",
        "gradient_checkpointing": "checkpointing" in words,
    }
    if model == "smollm2":
        from lorax.demo import smollm2_path

        settings["path"] = smollm2_path()
    if method == "qlora":
        settings["quantization"] = "nf4-dq"
    lora = {"r": 8, "target_modules": "all-linear"}
    return {
        "model": settings,
        "adapter": {"method": "full"} if method == "full" else lora,
        "data": {"path": str(folder / f"{length}.jsonl"), "max_length": length},
        "train": {
            "output_dir": str(folder / f"run {case}"),
            "max_steps": 2,
            "batch_size": batch * times,
            "micro_batch_size": batch,
            "optimizer": optimizer,
            "fast": "plain" not in words,
            "save_steps": 0,
        },
    }


def make(folder: Path, models: list[str]) -> None:
    """Random models of these names, and the rows, each cut at its length."""
    import torch

    sys.path.insert(0, str(HELPERS))
    from tiny_tokenizer import byte_tokenizer

    import lorax
    from lorax.formats.model_config import new_model, read_config

    for name in models:
        torch.manual_seed(0)
        model = new_model(read_config(MODELS[name], name)).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.tie_weights()
        lorax.save_model(model, folder / name, tokenizer=byte_tokenizer())
    for length in (64, 128, 256, 512, 1024):
        letters = string.ascii_letters
        texts = [letters[i:] * (4 * length // len(letters) + 2) for i in range(8)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{length}.jsonl").write_text(rows)


def train(case: str, folder: Path) -> None:
    """The run; prints the peak of its memory."""
    import lorax

    lorax.train(lorax.Recipe.from_dict(recipe_of(case, folder)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak}))


def measured(case: str, folder: Path) -> int:
    """The peak of a process of its own that trains it, in bytes."""
    command = [sys.executable, __file__, "--train", case, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr}")
    peak: int = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return peak


def predicted(case: str, folder: Path) -> int:
    """What `lorax estimate` says of it in a process of its own, in bytes."""
    command = [sys.executable, __file__, "--predict", case, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr}")
    found: int = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return found


def predict(case: str, folder: Path) -> None:
    """The estimate of the case's recipe; prints it."""
    import lorax
    from lorax.inspect.estimate.compare import estimate_recipe

    found = estimate_recipe(lorax.Recipe.from_dict(recipe_of(case, folder)))
    print(json.dumps(found.as_dict()))


def process() -> None:
    """What a first step touches beyond the imports: a run of a model of next to nothing."""
    from lorax.inspect.estimate.process import FIRST_STEP_BYTES, process_bytes

    imports = process_bytes() - FIRST_STEP_BYTES
    MODELS["tiny"] = LLAMA | {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    MODELS["tiny"] |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    MODELS["tiny"] |= {"num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), ["tiny"])
        train("tiny lora adamw 1x64", Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"imports_bytes": imports, "first_step_bytes": peak - imports}))


def run(cases: list[str]) -> None:
    """Measure and predict these cases; the worst is named."""
    path = sides.RESULTS / "estimates-cpu.json"
    kept = json.loads(path.read_text())["cases"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, list(MODELS))
        for case in cases:
            peak, foretold = measured(case, folder), predicted(case, folder)
            kept[case] = {
                "measured_bytes": peak,
                "predicted_bytes": foretold,
                "error": round(foretold / peak - 1, 4),
                **sides.machine(*PACKAGES),
            }
            print(
                f"{case:<50} {peak / 1e6:8.1f} MB {100 * kept[case]['error']:+6.1f} %", flush=True
            )
            worst = max(kept, key=lambda one: abs(kept[one]["error"]))
            sides.write_results("estimates-cpu", {"worst": worst, "cases": kept})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--process", action="store_true")
    parser.add_argument("--train")
    parser.add_argument("--predict")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.process:
        process()
    elif given.train:
        train(given.train, given.folder)
    elif given.predict:
        predict(given.predict, given.folder)
    else:
        run(given.case or CASES)
