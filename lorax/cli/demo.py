"""lorax demo: a real model, fine-tuned on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import Device, LocalPath, Positive
from lorax.cli.terminal import out


def demo(
    *,
    output_dir: LocalPath = Path("runs/demo"),
    steps: Positive = 48,
    model: str | None = None,
    dtype: Annotated[str, Parameter(help="auto takes bfloat16 where the CPU has it.")] = "auto",
    device: Device = "cpu",
) -> None:
    """Fine-tune a real model on this machine in a few minutes and show what changed.

    QLoRA on SmolLM2-135M-Instruct over questions about Python's standard library; whole modules
    are held out. `make demo` runs it.

    Parameters
    ----------
    output_dir
        The run's directory; must be missing or empty.
    steps
        Optimizer steps of 16 rows.
    model
        A model of your own instead.
    """
    from lorax.demo import run_demo

    run_demo(out, output_dir, steps, model, dtype, device)
