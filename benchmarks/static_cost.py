"""What the compiler makes of the kernels, for GPUs that need not be there.

    python benchmarks/static_cost.py                 a table for sm_90
    python benchmarks/static_cost.py --targets 80 86 89 90 100 120 --json cost.json
    python benchmarks/static_cost.py --ranks 8 64 512 --rank-targets 89 120     LoRA's ranks, too

Every kernel is compiled through its own host function, with the configuration that it would run
with and the shapes of Llama-3-8B, down to machine code by the ptxas that triton brings. From that:
registers, spills, shared memory, the instructions that load and multiply, and instructions a value
(a value is a decoded weight; in a loop the loop's body counts, per value of one turn).

Needs torch and triton. No time is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import torch
import triton
from bank_conflicts import wavefronts_a_gather

# Of a block that opts in: CUDA C Programming Guide, technical specifications.
SHARED_LIMIT_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L_\w+):")
HIDDEN, FEED_FORWARD, VOCABULARY = 4096, 14336, 128256
TOKENS = 2048
RANK = 16
CODE, MAP = torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code as text, and the resource usage."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run(
            [BINARIES / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
        usage = subprocess.run(
            [BINARIES / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    return code.stdout, usage.stdout


def instructions(code: str) -> tuple[list[str], list[str]]:
    """All instructions without padding, and those of the longest innermost loop (or none)."""
    labels: dict[str, int] = {}
    found: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := INSTRUCTION.search(line):
            if match[2] == "NOP":
                continue
            target = re.search(r"`\((\.L_\w+)\)", match[3])
            if match[2].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(found) + 1))
            found.append(match[2])
    loops = [loop for loop in loops if loop[1] - loop[0] > 1]  # the trap after EXIT jumps to itself
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return found, found[begin:end]


def packed_vector(ttgir: str) -> int | None:
    """How many int32 words a thread takes at once where the packed weight is loaded.

    The load is found by the name of its result; it may be an asynchronous copy to shared memory.
    """
    layouts = dict(
        re.findall(r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir, re.M)
    )
    load = r"%(?:packed|words)\w* = (?:tt\.load|ttg\.async_copy_global_to_local) "
    found = re.findall(load + r".*tensor<[\dx]+x!tt\.ptr<i32>, (#\w+)>", ttgir)
    widths = [int(layouts[name].split(",")[-1]) for name in found if name in layouts]
    return widths[0] if widths else None


def examine(kernel: Any) -> dict[str, Any]:
    """The facts about one compiled kernel."""
    code, usage = disassemble(kernel.asm["cubin"])
    everything, loop = instructions(code)
    counts = Counter(everything)

    def count(pattern: str, among: list[str] = everything) -> int:
        return sum(bool(re.match(pattern, name)) for name in among)

    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spills": count(r"(STL|LDL)\b") + stack + local,
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(everything),
        "loop_instructions": len(loop),
        "wide_loads": count(r"(LDG|LDGSTS)\..*128|UTMALDG"),
        "narrow_loads": count(r"(LDG|LDGSTS)\.(?!.*128)"),
        "fused_multiply_adds": count(r"FFMA"),
        "loop_fused_multiply_adds": count(r"FFMA", loop),
        "loop_barriers": count(r"BAR\b", loop),
        "mul_add_ptx": len(re.findall(r"fma\.rn\.f32", kernel.asm["ptx"])),
        "wavefronts_a_gather": wavefronts_a_gather(kernel.asm["ttgir"]),
        "packed_vector": packed_vector(kernel.asm["ttgir"]),
        "rounding_conversions": len(re.findall(r"cvt\.rn\.\w+\.f32", kernel.asm["ptx"])),
        "warp_group_products": count(r"HGMMA|UTC\w*MMA"),
        "warp_products": count(r"HMMA"),
        "common": dict(counts.most_common(6)),
    }


def make_weight(rows: int, columns: int, nested: bool = True) -> Any:
    from lorax.kernels.weight import PackedWeight

    n = rows * columns
    blocks = n // 64
    nested_tensors = (torch.empty(blocks // 256), MAP, torch.empty(()))
    return PackedWeight(
        torch.empty(n // 2, dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        CODE,
        (rows, columns),
        64,
        *(nested_tensors if nested else ()),
    )


def contracted_dequantize(weight: Any, out: torch.Tensor) -> None:
    """The control: what `dequantize` would be if multiplications and additions were fused."""
    from lorax.kernels import dequantize

    before = dequantize.launch

    def contracting(*args: Any, **options: Any) -> None:
        before(*args, **{**options, "enable_fp_fusion": True})

    dequantize.launch = contracting
    try:
        dequantize.dequantize(weight, out)
    finally:
        dequantize.launch = before


def cases(thorough: bool) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, call, and decoded values a thread (0 where none are decoded)."""
    from lorax.kernels import (
        adamw,
        cross_entropy,
        dequantize,
        launch,
        lora,
        matmul,
        narrow,
        quantize,
        tuning,
    )
    from lorax.kernels.hyper import AdamWStep

    gpu = launch.capability(torch.device("cpu"))
    half = torch.bfloat16
    table = tuning.dequantize(gpu)
    decoded = table.tile // (32 * table.num_warps)
    weight = make_weight(HIDDEN, FEED_FORWARD)

    def decode(dtype: torch.dtype, nested: bool = True) -> Callable[[], Any]:
        packed = weight if nested else make_weight(HIDDEN, FEED_FORWARD, nested=False)
        return lambda: dequantize.dequantize(packed, torch.empty(packed.shape, dtype=dtype))

    yield "dequantize bf16, nested", decode(half), decoded
    if thorough:
        yield "dequantize bf16", decode(half, nested=False), decoded
        yield "dequantize fp16, nested", decode(torch.float16), decoded
        yield "dequantize fp32, nested", decode(torch.float32), decoded
        out = torch.empty(weight.shape, dtype=half)
        yield "control: contracted", lambda: contracted_dequantize(weight, out), 0

    vector = tuning.vector(gpu)
    skinny = tuning.skinny(gpu)
    narrow_rows = tuning.narrow(gpu)
    shapes = [(HIDDEN, FEED_FORWARD)]
    if thorough:
        shapes += [(HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN)]
    for N, K in shapes:
        W = make_weight(N, K)
        for M in (1, 16) if K == FEED_FORWARD else (16,):
            x = torch.empty(M, K, dtype=half)
            low = (torch.empty(RANK, K), torch.empty(N, RANK), 2.0)
            values = narrow_rows.rows * narrow.STEP // (32 * narrow_rows.num_warps)
            call = partial(narrow.products, x, [W], [None], [low])
            yield f"narrow {N}x{K} M={M}, LoRA", call, values
        for M in (1, 16, 64):
            threads = 32 * (vector.num_warps if M == 1 else skinny.num_warps[M])
            values = vector.rows * vector.step if M == 1 else skinny.rows * 64
            x = torch.empty(M, K, dtype=half)
            path = (torch.empty(M, RANK, dtype=half), torch.empty(N, RANK), 2.0)
            bias = torch.empty(N, dtype=half)
            yield f"product {N}x{K} M={M}", partial(matmul.fused, x, W), values // threads
            if M != 64 and K == FEED_FORWARD:
                yield (
                    f"product {N}x{K} M={M}, bias, LoRA",
                    partial(matmul.fused, x, W, bias, path),
                    values // threads,
                )
        for M in (16, 64) if K == FEED_FORWARD else (64,):
            dy = torch.empty(M, N, dtype=half)
            back = (torch.empty(M, RANK, dtype=half), torch.empty(RANK, K).t(), 1.0)
            config = tuning.backward(gpu)
            yield (
                f"dx {N}x{K} M={M}, LoRA",
                partial(matmul.fused_dx, dy, W, back),
                config.columns * config.rows // (32 * config.num_warps),
            )

    x = torch.empty(TOKENS, HIDDEN, dtype=half)
    yield "LoRA x A^T, M=64", lambda: lora.down(x[:64], torch.empty(RANK, HIDDEN)), 0
    h = torch.empty(TOKENS, RANK, dtype=half)
    yield f"LoRA dA, M={TOKENS}", lambda: lora.cross(h, x), 0
    yield f"LoRA dB, M={TOKENS}", lambda: lora.cross(x, h), 0

    yield from step_cases(half)
    logits = torch.empty(64, VOCABULARY, dtype=half)
    targets, losses = torch.empty(64, dtype=torch.int64), torch.empty(64)
    yield (
        "cross entropy",
        lambda: cross_entropy.softmax_gradient(logits, targets, losses, True),
        0,
    )
    source = torch.empty(HIDDEN, HIDDEN, dtype=half)
    yield "quantize to 4 bits", lambda: quantize.quantize_4bit(source, torch.empty(16), 64), 0
    yield "quantize to 8 bits", lambda: quantize.quantize_8bit(source, torch.empty(256), 256), 0
    steps = [AdamWStep.at(1, 1e-4)]
    floats = [[torch.empty(RANK, HIDDEN)] for _ in range(4)]
    yield "AdamW", lambda: adamw.adamw(*floats, steps), 0
    codes = [torch.empty(RANK, HIDDEN, dtype=torch.uint8)]
    scales = [torch.empty(RANK * HIDDEN // 256)]
    maps = (torch.empty(256), torch.empty(256))
    yield (
        "AdamW 8-bit",
        lambda: adamw.adamw_8bit(*floats[:2], codes, scales, codes, scales, steps, *maps),
        0,
    )


def step_cases(half: torch.dtype) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """The training step's own kernels, at Llama-3-8B's widths."""
    from lorax.kernels import step
    from lorax.kernels.drop import Drop

    def rows(width: int) -> torch.Tensor:
        return torch.empty(TOKENS, width, dtype=half)

    x, both, a = rows(HIDDEN), rows(2 * FEED_FORWARD), rows(FEED_FORWARD)
    weight, scale = torch.empty(HIDDEN, dtype=half), torch.empty(TOKENS)
    yield "step norm", lambda: step.norm(x, weight, 1e-5, x), 0
    yield "step norm backward", lambda: step.norm_backward(x, x, weight, scale, x), 0
    turns = torch.empty(TOKENS, 128, dtype=half)
    yield "step rope", lambda: step.rope_(rows(6144), turns, turns, 40), 0
    yield "step swiglu", lambda: step.swiglu(both), 0
    yield "step swiglu backward", lambda: step.swiglu_backward(a, both), 0
    drop = Drop(torch.empty(1, dtype=torch.int64), 3, 0.1)
    A, h = torch.empty(RANK, HIDDEN), rows(RANK)
    yield "step h, dropout", lambda: step.down(x, A, drop=drop), 0
    yield "step dA, dropout", lambda: step.cross(h, x, drop=drop), 0
    yield "step dx, dropout", lambda: step.add_dropped(x, h, A, drop), 0
    weights = [make_weight(N, HIDDEN) for N in (4096, 1024, 1024)]
    ups = [(torch.empty(w.shape[0], RANK), 2.0) for w in weights]
    out = torch.empty(6144, HIDDEN + 3 * RANK, dtype=half)
    yield "step decode q, k, v", lambda: step.decode_columns(weights, ups, out), 0


def rank_cases(ranks: list[int]) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """What multiplies with a path, at each rank, where registers and shared memory are scarcest."""
    from lorax.kernels import lora, matmul, narrow

    half, N, K = torch.bfloat16, HIDDEN, FEED_FORWARD
    weight = make_weight(N, K)
    x, dy = torch.empty(64, K, dtype=half), torch.empty(64, N, dtype=half)
    for r in ranks:
        h, A, B = torch.empty(64, r, dtype=half), torch.empty(r, K), torch.empty(N, r)
        for M in (1, 16):
            path = (h[:M], B, 2.0)
            yield f"r={r} product M={M}", partial(matmul.fused, x[:M], weight, None, path), 0
        yield f"r={r} dx M=64", partial(matmul.fused_dx, dy, weight, (h, A.t(), 1.0)), 0
        yield f"r={r} narrow", partial(narrow.products, x[:16], [weight], [None], [(A, B, 2.0)]), 0
        yield f"r={r} x A^T", partial(lora.down, x, A), 0
        yield f"r={r} dA", partial(lora.cross, h, x), 0


def measure(
    targets: list[int], ranks: list[int], rank_targets: list[int], thorough_target: int = 90
) -> list[dict[str, Any]]:
    """All cases on all targets, more dtypes and shapes on one of them; then the ranks."""
    whole = [(target, cases(thorough=target == thorough_target)) for target in targets]
    return [
        row
        for target, chosen in [*whole, *((target, rank_cases(ranks)) for target in rank_targets)]
        for row in compiled_rows(target, chosen)
    ]


def compiled_rows(
    target: int, chosen: Iterator[tuple[str, Callable[[], Any], int]]
) -> list[dict[str, Any]]:
    """The facts of each kernel that the chosen cases start on one target."""
    from lorax.kernels.launch import compile_only

    rows = []
    with compile_only(target) as compiled:
        for name, call, values in chosen:
            compiled.clear()
            call()
            for kernel in compiled:
                facts = {"target": target, "case": name, **examine(kernel)}
                facts["shared_limit_bytes"] = SHARED_LIMIT_BYTES[target]
                body = facts["loop_instructions"] or facts["instructions"]
                decoded = values if facts["kernel"] != "_arrange_kernel" else 0
                facts["values_a_thread"] = decoded
                facts["instructions_a_value"] = round(body / decoded, 2) if decoded else None
                rows.append(facts)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="*", default=[90], choices=SHARED_LIMIT_BYTES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[])
    parser.add_argument("--rank-targets", type=int, nargs="+", default=[89])
    parser.add_argument("--json", type=Path, help="write all facts here")
    arguments = parser.parse_args()
    import kernel_testing  # noqa: F401  finds lorax.kernels on a machine without lorax

    rows = measure(arguments.targets, arguments.ranks, arguments.rank_targets)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print(
        f"{'target':7}{'case':38}{'regs':>5}{'spill':>6}{'shared':>8}{'SASS':>6}"
        f"{'a value':>8}{'banks':>6}{'16 B':>5}{'tensor':>7}"
    )
    for row in rows:
        print(
            f"sm_{row['target']:<4}{row['case']:38}{row['registers']:5}{row['spills']:6}"
            f"{row['shared_bytes']:8}{row['instructions']:6}"
            f"{row['instructions_a_value'] or '':>8}{row['wavefronts_a_gather'] or '':>6}"
            f"{row['wide_loads']:5}"
            f"{row['warp_group_products'] + row['warp_products']:7}"
        )


if __name__ == "__main__":
    main()
