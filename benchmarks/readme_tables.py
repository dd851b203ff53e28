"""The tables of README.md and docs/, made from the files in benchmarks/results/.

    python benchmarks/readme_tables.py          rewrites what stands between the markers

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a test holds that the pages say
what the files say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_suite

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def training_step() -> str:
    lines = [
        "| case | lorax | PEFT | times as fast | memory, of PEFT's | of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for case, r in results("training_step-cpu")["cases"].items():
        lines.append(
            f"| {case} | {r['lorax_seconds']:.2f} s | {r['peft_seconds']:.2f} s | "
            f"{r['times_as_fast']:.2f} | {r['memory_ratio']:.2f} | {r['times_the_floor']:.2f} |"
        )
    return "\n".join(lines)


def throughput() -> str:
    found = results("training_throughput-cpu")
    lines = ["| side | tokens a second | of Trainer's | peak memory |", "|---|---|---|---|"]
    trainer = found["sides"]["trainer"]["tokens_per_second"]
    for name, side in found["sides"].items():
        speed, memory = side["tokens_per_second"], side["peak_bytes"] / 1e6
        lines.append(f"| {name} | {speed:,.0f} | {speed / trainer:.2f} | {memory:,.0f} MB |")
    return "\n".join(lines)


def generation() -> str:
    lines = [
        "| case | lorax | the other | times as fast | first token | memory, of theirs |",
        "|---|---|---|---|---|---|",
    ]
    for case, r in results("generation-cpu")["cases"].items():
        first = f"{r['lorax_first_seconds']:.2f} / {r['peer_first_seconds']:.2f} s"
        lines.append(
            f"| {case} | {r['lorax_tokens_per_second']:.1f} | {r['peer_tokens_per_second']:.1f} | "
            f"{r['times_as_fast']:.2f} | {first} | {r['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def quantization() -> str:
    lines = ["| case | lorax | bitsandbytes | times as fast |", "|---|---|---|---|"]
    for case, r in results("quantization-cpu")["cases"].items():
        lines.append(
            f"| {case} | {1e3 * r['lorax_seconds']:.1f} ms | "
            f"{1e3 * r['bitsandbytes_seconds']:.1f} ms | {r['times_as_fast']:.2f} |"
        )
    return "\n".join(lines)


def codebooks() -> str:
    found = results("codebooks")
    rows = {(r["codebook"], r["block_size"]): r for r in found["rows"]}
    sizes = sorted({size for (_, size), r in rows.items() if "smollm2_perplexity" in r})
    head = " | ".join(f"blocks of {size}" for size in sizes)
    lines = [f"| codebook | {head} |", "|---|" + "---|" * len(sizes)]
    for name in dict.fromkeys(name for name, _ in rows):
        cells = (rows[name, size] for size in sizes)
        text = " | ".join(
            f"{100 * c['smollm2_relative_rms']:.1f} % / {c['smollm2_perplexity']:.2f}"
            for c in cells
        )
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def merging() -> str:
    found = results("merging-cpu")
    lines = [
        "| route | lost of the weights' change | KL, nats a token | logits moved | MB |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(found["routes"], key=lambda r: r["kl"]):
        lines.append(
            f"| {r['route']} | {percent(r['lost'])} | {r['kl']:.1e} | {percent(r['of_effect'])} | "
            f"{r['nbytes'] / 1e6:.0f} |"
        )
    lines.append(f"| no adapter | 100 % | {found['adapter_kl']:.1e} | 100 % | |")
    return "\n".join(lines)


def percent(share: float) -> str:
    if share >= 10:
        return f"{100 * share:,.0f} %"
    return f"{100 * share:.3g} %" if share >= 1e-4 else f"{100 * share:.1e} %"


def variants() -> str:
    """DoRA's step over LoRA's, and every variant; what was not measured or is missing says so."""
    path = RESULTS / "variants-cpu.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    lines = [
        "| base | DoRA's step over LoRA's: lorax | PEFT | lorax's DoRA | PEFT's |",
        "|---|---|---|---|---|",
    ]
    for base, r in found.get("dora", {}).items():
        ours, theirs = (r["sides"][f"{who} dora"]["seconds"] for who in ("lorax", "peft"))
        lines.append(
            f"| {base} | {r['lorax_dora_over_lora']:.2f} | {r['peft_dora_over_lora']:.2f} | "
            f"{ours:.2f} s | {theirs:.2f} s |"
        )
    training = found.get("training", {})
    if not training:
        return "\n".join([*lines, "", "The variants' training has not been measured yet."])
    lines += [
        "",
        "| variant | a step, of LoRA's | memory | trained parameters | rate | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, v in training.items():
        if "missing" in v:
            lines.append(f"| {name} | not in this version | | | | |")
            continue
        lines.append(
            f"| {name} | {v['over_lora']:.2f} | {v['peak_bytes'] / 1e9:.2f} GB | "
            f"{v['trainable']:,} | {v['learning_rate']:g} | "
            f"{v['eval_loss_before']:.3f} → {v['eval_loss']:.3f} |"
        )
    return "\n".join(lines)


def gpu() -> str:
    return gpu_suite.table(RESULTS)


def summary() -> str:
    """The README's six rows: three of parity, which tests hold, and three of cost."""
    quick = results("quantization-cpu")["cases"]
    lines = [
        "| against | what | how closely, or at what cost |",
        "|---|---|---|",
        "| transformers 5.23 | SmolLM2-135M's logits, float32 | within 1e-4, equal when measured |",
        "| bitsandbytes 0.50.2 | NF4 bytes, scales, checkpoints both ways | bit-equal |",
        "| Trainer over PEFT 0.21.2 | a run in float32: losses, gradient norms, rates | "
        "1e-5, 1e-4, 1e-9 relative |",
    ]
    sides = results("training_throughput-cpu")["sides"]
    trainer = sides["trainer"]
    for name in ("lorax", "lorax packed"):
        rows = "packed" if "packed" in name else "padded"
        faster = sides[name]["tokens_per_second"] / trainer["tokens_per_second"]
        memory = sides[name]["peak_bytes"] / trainer["peak_bytes"]
        lines.append(
            "| Trainer over PEFT 0.21.2 | an epoch of LoRA, a small Llama on a CPU core, rows "
            f"{rows} | {faster:.2f} times as fast, {memory:.2f} of its memory |"
        )
    found = quick["quantize nf4-dq bfloat16"]
    lines.append(
        "| bitsandbytes 0.50.2 | quantize 4096 x 4096 bfloat16 to nf4-dq, two CPU cores | "
        f"{found['times_as_fast']:.2f} times as fast |"
    )
    return "\n".join(lines)


def claim() -> str:
    """What the README's first lines say of cost."""
    sides = results("training_throughput-cpu")["sides"]
    ours, trainer = (sides[name] for name in ("lorax packed", "trainer"))
    return (
        f"{ours['tokens_per_second'] / trainer['tokens_per_second']:.1f} times as fast as "
        f"transformers' Trainer over PEFT, in {ours['peak_bytes'] / trainer['peak_bytes']:.2f} of "
        "its memory"
    )


def optimizers() -> str:
    found = results("optimizers-cpu")
    lines = ["| optimizer | a step | bytes of state a parameter |", "|---|---|---|"]
    for r in found["results"]:
        lines.append(
            f"| {r['name']} | {r['milliseconds']:.1f} ms | {r['state_bytes_per_parameter']:.2f} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "optimizers": optimizers,
    "training_step": training_step,
    "throughput": throughput,
    "generation": generation,
    "quantization": quantization,
    "codebooks": codebooks,
    "merging": merging,
    "variants": variants,
    "gpu": gpu,
}


def filled(text: str) -> str:
    """A page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """The README, and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for path in pages():
        text = path.read_text()
        if filled(text) != text:
            path.write_text(filled(text))


if __name__ == "__main__":
    main()
