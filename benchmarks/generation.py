"""Generation with SmolLM2-135M, lorax against transformers (+ bitsandbytes, + PEFT), on a CPU.

    python benchmarks/generation.py                     all sixteen cases, some twenty minutes
    python benchmarks/generation.py --case "nf4-dq float32 x1"          one of them, or more

The results file keeps each case with the machine, the commit and the rounds it was measured with,
and a run replaces the cases that it measures.

A round is 64 new tokens (--tokens), the likeliest each time, for one prompt or for eight of
different lengths, and no end token counts: both sides make the same number of tokens. Tokens a
second are all new tokens over the whole time, the prompt's included; the time to the first token is
that of a call for one. Where other programs run beside it, the ratio of the processor's time says
more than that of the clock. Models are in eval mode, where bitsandbytes takes its kernels for
inference. The adapter has r = 16 on every Linear and stands beside the base, unmerged, on both
sides. Memory is the process's peak, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sides
import torch

import lorax
from lorax.demo import smollm2_path
from lorax.inference.batch import stream_rows

CASES = [
    f"{weights} {dtype} x{batch}{adapter}"
    for weights in ("dense", "nf4-dq")
    for dtype in ("float32", "bfloat16")
    for batch in (1, 8)
    for adapter in ("", " adapter")
]
NAME = "generation-cpu"
VOCABULARY = 49152
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
Generate = Callable[[int], int]  # new tokens for each prompt -> how many were made


def prompts(batch: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = [32 + 3 * row for row in range(batch)]
    return [torch.randint(17, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def lorax_side(weights: str, dtype: str, batch: int, adapter: str, folder: Path) -> Generate:
    quantization = None if weights == "dense" else weights
    model = lorax.load_model(folder / "model", dtype, quantization=quantization)
    if adapter:
        lorax.load_adapter(model, folder / "adapter")
    ids = prompts(batch)

    def generate(count: int) -> int:
        made = stream_rows(model, (), ids, [count] * batch, batch_size=batch)
        return sum(token is not None for _, token in made)

    return generate


def peer_side(weights: str, dtype: str, batch: int, adapter: str, folder: Path) -> Generate:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    compute = getattr(torch, dtype)
    options = {}
    if weights != "dense":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    made = transformers.AutoModelForCausalLM.from_pretrained
    model = made(folder / "model", dtype=compute, **options)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter")
    model.eval()
    rows = prompts(batch)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def generate(count: int) -> int:
        made = model.generate(
            input_ids=ids, attention_mask=seen, do_sample=False, pad_token_id=0,
            min_new_tokens=count, max_new_tokens=count,
        )  # fmt: skip
        return made[:, longest:].numel()

    return generate


def timed(generate: Generate, batch: int, tokens: int) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        started = time.perf_counter()
        generate(1)
        first = time.perf_counter() - started
        busy = time.process_time()
        count = generate(tokens)
        seconds = time.perf_counter() - started - first
        busy = time.process_time() - busy
        assert count == batch * tokens, f"{count} tokens, not {batch * tokens}"
        return {"seconds": seconds, "first_seconds": first, "processor_seconds": busy}

    return step


SIDES = {"lorax": lorax_side, "peer": peer_side}


def split(case: str) -> tuple[str, str, int, str]:
    weights, dtype, batch, *adapter = case.split()
    return weights, dtype, int(batch.removeprefix("x")), "".join(adapter)


def measure(case: str, folder: str, rounds: int, each: int) -> dict[str, float]:
    given = ("--case", case, "--folder", folder, "--tokens", str(each))
    both = [sides.Side(__file__, name, *given) for name in SIDES]
    found = sides.compare(both, warm=1, steps=rounds)
    ours, theirs = (found[name] for name in SIDES)
    tokens = split(case)[2] * each
    return {
        "lorax_tokens_per_second": tokens / ours["seconds"],
        "peer_tokens_per_second": tokens / theirs["seconds"],
        "times_as_fast": theirs["seconds"] / ours["seconds"],
        "times_by_processor": theirs["processor_seconds"] / ours["processor_seconds"],
        "lorax_first_seconds": ours["first_seconds"],
        "peer_first_seconds": theirs["first_seconds"],
        "lorax_peak_bytes": ours["peak_bytes"],
        "peer_peak_bytes": theirs["peak_bytes"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
    }


def keep(case: str, result: dict[str, float], rounds: int, tokens: int) -> None:
    """Put a case into the results file, in the cases' order."""
    path = sides.RESULTS / f"{NAME}.json"
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}
    machine = sides.machine(*PACKAGES) | {"threads": torch.get_num_threads()}
    cases[case] = {**result, "rounds": rounds, "new_tokens": tokens, "machine": machine}
    sides.write_results(NAME, {"cases": {c: cases[c] for c in CASES if c in cases}})


def prepare(folder: Path) -> None:
    """The model's directory, and an adapter whose path is not zero."""
    lorax.save_model(lorax.load_model(smollm2_path()), folder / "model")
    model = lorax.load_model(folder / "model")
    torch.manual_seed(0)
    config = lorax.LoRAConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False
    )
    lorax.add_adapter(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    lorax.save_adapter(model, folder / "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        case = split(options.case[0])
        side = SIDES[options.side](*case, Path(options.folder))
        sides.serve(timed(side, case[2], options.tokens))
        return
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        for case in options.case or CASES:
            r = measure(case, temporary, options.rounds, options.tokens)
            keep(case, r, options.rounds, options.tokens)
            print(
                f"{case:28} lorax {r['lorax_tokens_per_second']:.1f}  peer "
                f"{r['peer_tokens_per_second']:.1f} tokens/s  {r['times_as_fast']:.2f} times, "
                f"{r['times_by_processor']:.2f} by the processor's time  "
                f"first {r['lorax_first_seconds']:.2f} / {r['peer_first_seconds']:.2f} s  "
                f"memory {r['lorax_peak_bytes'] / 1e9:.2f} / {r['peer_peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
