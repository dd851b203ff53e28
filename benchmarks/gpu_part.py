"""One part of the GPU suite, in a process of its own: `gpu_part.py NAME --output FILE [--tiny]`.

The file is written anew after each row, so that a part which is stopped leaves what it has. Ends
with 1 if a check was red; its time is then left out, and the next row is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

KERNELS = ("dequantize", "products", "step_kernels", "loss")
MODEL = ("step", "peft_step", "generation", "paging")


def is_red(value: Any) -> bool:
    """Whether a check somewhere within does not hold."""
    if isinstance(value, dict):
        return value.get("ok") is False or any(is_red(part) for part in value.values())
    return isinstance(value, list) and any(is_red(part) for part in value)


def rows_of(name: str, tiny: bool) -> Any:
    import kernel_testing  # finds lorax and lorax.kernels where lorax is not installed

    device = kernel_testing.DEVICE
    if name in KERNELS:
        import gpu_kernels

        return gpu_kernels.parts(name, device, tiny)
    if name in MODEL:
        import gpu_model

        return gpu_model.parts(name, device, tiny)
    import gpu_optimizers

    sizes = (4, 32, 2) if tiny else (450, 4096, 20)
    return (("optimizers", row) for row in gpu_optimizers.time_optimizers(device, *sizes))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*KERNELS, *MODEL, "optimizers"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    import torch

    torch.manual_seed(0)
    report: dict[str, Any] = {}
    for key, value in rows_of(arguments.name, arguments.tiny):
        if key == arguments.name:
            report.setdefault(key, []).append(value)
        else:
            report[key] = value
        arguments.output.write_text(json.dumps(report, indent=1))
        print(json.dumps(value), flush=True)
    return int(is_red(report))


if __name__ == "__main__":
    sys.exit(main())
