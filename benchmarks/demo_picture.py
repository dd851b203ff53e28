"""The demo's picture, docs/demo.png: what `lorax demo` measured, and one answer before and after.

    python benchmarks/demo_picture.py            runs the demo, writes results/demo-cpu.json, draws
    python benchmarks/demo_picture.py --draw     draws from that file again

Run it on a machine with nothing else to do: the picture says how long it took.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT, PICTURE = HERE / "results" / "demo-cpu.json", HERE.parent / "docs" / "demo.png"
BLUE, RED, GREY = "#4c78a8", "#e45756", "#5f6368"
NUMBERS = r"(base|adapter|merged) {2,}.*(bytes|logits)"  # the demo's lines that say sizes
WIDTH = 64  # letters in a line of the picture's text


def measure(steps: int, model: str | None) -> dict[str, Any]:
    """Run the demo: its metrics, its question with both answers, and its last lines."""
    from lorax.adapters.inject import disabled_adapter
    from lorax.console import PlainConsole
    from lorax.demo import QUESTIONS, run_demo
    from lorax.inference.generate import generate

    console, started = PlainConsole(record=True, width=200), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = run_demo(console, Path(folder) / "demo", steps, model, "auto", "cpu")
        minutes = (time.perf_counter() - started) / 60
        prompt = run.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True
        )
        with disabled_adapter(run.model):
            before = generate(run.model, run.tokenizer, prompt, max_new_tokens=48)
        after = generate(run.model, run.tokenizer, prompt, max_new_tokens=48)
        said = console.export_text().replace(folder, "runs")
    numbers = [line for line in said.splitlines() if re.match(NUMBERS, line)]
    return {
        "minutes": minutes, "metrics": run.metrics, "question": QUESTIONS[0], "before": before,
        "after": after, "numbers": numbers,
    }  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """Losses on the left; the answers, and what it cost in bytes, on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, text = figure.subplots(1, 2, width_ratios=(1, 1.15))
    draw_losses(losses, found)
    text.axis("off")
    lines = [
        (GREY, f"Q  {found['question'].replace('`', '')}"),
        (RED, f"before  {found['before'].strip()}"),
        (BLUE, f"after  {found['after'].strip()}"),
        *((GREY, re.sub(r" \(runs.*?\)", "", line)) for line in found["numbers"]),
    ]
    y = 1.0
    for color, line in lines:
        wrapped = textwrap.wrap(line, WIDTH, subsequent_indent="   ")[:5]
        text.text(0, y, "\n".join(wrapped), color=color, va="top", family="monospace", size=9,
                  parse_math=False,
                  linespacing=1.35)  # fmt: skip
        y -= 0.056 * len(wrapped) + 0.025
    figure.savefig(path)


def draw_losses(axes: Any, found: dict[str, Any]) -> None:
    """Each step's loss, and the held-out loss at the start and the end."""
    steps = [line for line in found["metrics"] if "loss" in line]
    held_out = [line for line in found["metrics"] if "eval_loss" in line]
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], ".-", color=BLUE, lw=1.2,
              ms=4, label="training")  # fmt: skip
    axes.plot([e["step"] for e in held_out], [e["eval_loss"] for e in held_out], "o:", color=RED,
              lw=1.5, label="held-out modules")  # fmt: skip
    for e in (held_out[0], held_out[-1]):
        axes.annotate(f"{e['eval_loss']:.2f}", (e["step"], e["eval_loss"]), xytext=(5, 7),
                      textcoords="offset points", color=RED)  # fmt: skip
    axes.set_title(f"lorax demo: QLoRA of SmolLM2-135M, {found['minutes']:.0f} minutes on a CPU",
                   size=11, loc="left")  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.25)
    axes.margins(x=0.08, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="from the results that are there")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--model", help="another model than the demo's")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args()
    if not given.draw:
        found = measure(given.steps, given.model)
        given.result.write_text(json.dumps(found, indent=1) + "\n")
    draw(json.loads(given.result.read_text()), given.picture)


if __name__ == "__main__":
    main()
