"""What each way of merging a QLoRA adapter loses, on SmolLM2-135M: the README's table.

    lorax demo --steps 24 --dtype bfloat16 --output-dir runs/demo
    python benchmarks/merging.py runs/demo

It is `lorax merge runs/demo --report --json` with two ranks of the residual more and without the
layers, written to benchmarks/results/merging-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lorax.merging import laboratory as merging
from lorax.merging.routes import Route

RESULT = Path(__file__).parent / "results" / "merging-cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the run of lorax demo")
    path = parser.parse_args().run
    laboratory, tokenizer = merging.open_laboratory(path)
    config = laboratory.model.adapter_config
    more = [Route(laboratory.dtype, format="nf4-dq", residual_rank=rank) for rank in (4, 64)]
    ids = merging.sample(tokenizer, laboratory.model.max_positions)
    report = laboratory.compare(laboratory.routes(also=more), ids, print)
    rows = []
    for cost in report.routes:
        row = cost.as_dict()
        del row["layers"]
        rows.append(row)
    metrics = (Path(path) / "metrics.jsonl").read_text().splitlines()
    found = {
        "model": "SmolLM2-135M-Instruct",
        "quantization": laboratory.quantization,
        "dtype": str(laboratory.dtype).removeprefix("torch."),
        "rank": config.r,
        "steps": json.loads(metrics[-1])["step"],
        "tokens": report.tokens,
        "adapter_kl": report.adapter.kl,
        "adapter_moved": report.adapter.moved,
        "routes": rows,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
