"""Which sixteen values? NF4, FP4, INT4, AF4 and a table fitted to the data, by block size.

    python benchmarks/codebooks.py              some minutes; writes results/codebooks.{json,png}

Error: mean |back - w| and RMS error relative to the weights' RMS, on a million normal numbers and
on all quantized weights of SmolLM2-135M. Perplexity: of SmolLM2 with those weights, on 64
held-out docstrings of the demo. Scales are float32 here; the question is the codebook.

AF4 is AbnormalFloat (Yoshida 2023, arXiv:2306.06965), its values for blocks of 64. The fitted table
is Lloyd-Max: sixteen values, -1, 0 and 1 among them, that minimize the squared error of normal
numbers divided by their block's largest magnitude, found for each block size by alternating
assignment and means (Lloyd 1982).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import sides
import torch
from torch import Tensor

import lorax
from lorax.data.docstrings import write_pairs
from lorax.data.examples import load_examples
from lorax.demo import smollm2_path
from lorax.formats.huggingface import quantizable
from lorax.quant import codebooks
from lorax.quant.blockwise import dequantize_blockwise, quantize_blockwise
from lorax.quant.nearest import midpoints
from lorax.training.evaluate import evaluate

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PERPLEXITY_BLOCK_SIZES = (32, 64, 256, 1024)
PERPLEXITY_ROWS = 64
AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip


def lloyd_max(block_size: int, rounds: int = 200) -> Tensor:
    """Sixteen values fitted to normal numbers in blocks of that size: (16,) float32, ascending."""
    generator = torch.Generator().manual_seed(block_size)
    blocks = torch.randn(2**18 // block_size, block_size, generator=generator)
    y = (blocks / blocks.abs().amax(1, keepdim=True)).flatten().sort().values.double()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), y.cumsum(0)])
    code = codebooks.four_bit("nf4").double().clone()
    for _ in range(rounds):
        edges = torch.searchsorted(y, midpoints(code), right=True)
        bounds = torch.cat([torch.tensor([0]), edges, torch.tensor([len(y)])])
        counts = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / counts.clamp_min(1)
        code = torch.where(counts > 0, means, code)
        code[0], code[7], code[15] = -1.0, 0.0, 1.0
    return code.float()


def tables(block_size: int) -> dict[str, Tensor]:
    return {
        "NF4": codebooks.four_bit("nf4"),
        "FP4": codebooks.four_bit("fp4"),
        "INT4": torch.arange(-7, 8, dtype=torch.float32) / 7,
        "AF4": torch.tensor(AF4),
        "fitted": lloyd_max(block_size),
    }


def back(w: Tensor, code: Tensor, block_size: int) -> Tensor:
    """Quantize and dequantize, float32 scales."""
    codes, absmax = quantize_blockwise(w.flatten(), code, block_size)
    out = torch.empty(w.numel())
    return dequantize_blockwise(codes, absmax, code, block_size, out).view(w.shape)


def errors(weights: list[Tensor], code: Tensor, block_size: int) -> dict[str, float]:
    absolute = squared = size = 0.0
    count = 0
    for w in weights:
        difference = back(w, code, block_size).sub_(w)
        absolute += difference.abs().sum(dtype=torch.float64).item()
        squared += difference.square().sum(dtype=torch.float64).item()
        size += w.square().sum(dtype=torch.float64).item()
        count += w.numel()
    return {"mean_error": absolute / count, "relative_rms": math.sqrt(squared / size)}


def plot(rows: list[dict[str, float | str]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("normal_relative_rms", "normal numbers", "RMS error (%)", 100),
        ("smollm2_relative_rms", "SmolLM2-135M's weights", "RMS error (%)", 100),
        ("smollm2_perplexity", "SmolLM2-135M", "perplexity, held-out docstrings", 1),
    )
    for axes, (key, title, label, factor) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in dict.fromkeys(row["codebook"] for row in rows):
            mine = [r for r in rows if r["codebook"] == name and key in r]
            axes.plot([r["block_size"] for r in mine], [factor * r[key] for r in mine], "o-",
                      ms=3.5, lw=1.2, label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlabel("block size")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = lorax.load_model(smollm2_path())
    tokenizer = lorax.load_tokenizer(smollm2_path())
    with tempfile.TemporaryDirectory() as folder:
        held_out = write_pairs(Path(folder))[1]
        texts = load_examples(held_out, tokenizer, 256).rows[:PERPLEXITY_ROWS]
    modules = [m for n, m in model.named_modules() if quantizable(n, m)]
    weights = [m.weight.detach().clone() for m in modules]
    normal = [torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))]

    def perplexity() -> float:
        return evaluate(model, texts, 8, tokenizer.pad_token_id)["eval_perplexity"]

    whole = perplexity()
    print(f"unquantized perplexity {whole:.3f}", flush=True)
    rows: list[dict[str, float | str]] = []
    for block_size in BLOCK_SIZES:
        for name, code in tables(block_size).items():
            row: dict[str, float | str] = {"codebook": name, "block_size": block_size}
            for data, tensors in (("normal", normal), ("smollm2", weights)):
                found = errors(tensors, code, block_size)
                row |= {f"{data}_{key}": value for key, value in found.items()}
            if block_size in PERPLEXITY_BLOCK_SIZES:
                for module, w in zip(modules, weights, strict=True):
                    module.weight.data = back(w, code, block_size)
                row["smollm2_perplexity"] = perplexity()
            rows.append(row)
            print({k: v if isinstance(v, str) else float(f"{v:.4g}") for k, v in row.items()},
                  flush=True)  # fmt: skip
    content = {
        "machine": sides.machine("torch"),
        "unquantized_perplexity": whole,
        "rows": rows,
    }
    print(sides.write_results("codebooks", content))
    plot(rows, sides.RESULTS / "codebooks.png")


if __name__ == "__main__":
    main()
