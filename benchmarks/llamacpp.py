"""SmolLM2 with a trained adapter, in llama.cpp and in lorax: the same next tokens?

    pip install --target /somewhere --no-deps xllamacpp         llama.cpp as a wheel, for a CPU
    PYTHONPATH=/somewhere python benchmarks/llamacpp.py         trains eight steps first
    ... --adapter runs/mine                                     takes this adapter of SmolLM2

Each line is a file that `lorax export` wrote, or two of them, opened by llama.cpp, against lorax's
own model with the adapter unmerged: how far the log probabilities of all next tokens are apart
behind each prompt (the largest, and KL(lorax || llama.cpp) in nats), and how many of the likeliest
tokens that llama.cpp writes are lorax's. Its products and its cache are in float32.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sides
import torch
from torch import Tensor

import lorax
from lorax.data.docstrings import write_pairs
from lorax.demo import demo_recipe, smollm2_path
from lorax.formats.export import export
from lorax.training.loop import train

NAME = "llamacpp-cpu"
PACKAGES = ("torch", "gguf", "xllamacpp")
QUESTIONS = ("What does `os.path.join` do?", "What does `zipfile.is_zipfile` do?", "Who are you?")
CASES = {  # name -> the model's file and type, and the adapter's, if any
    "the base, F32": ("base", "F32", None),
    "the base, F32, and gguf-adapter": ("base", "F32", "F32"),
    "the base, F32, and gguf-adapter, F16": ("base", "F32", "F16"),
    "merged, F32": ("merged", "F32", None),
    "merged, F16": ("merged", "F16", None),
    "merged, Q8_0": ("merged", "Q8_0", None),
}


@dataclass(frozen=True)
class Truth:
    """What lorax says behind a prompt: log p of each next token (V,), and the likeliest tokens."""

    ids: list[int]
    logp: Tensor
    greedy: list[int]


def trained(folder: Path, steps: int) -> Path:
    train_file, held_out = write_pairs(folder / "data")
    recipe = demo_recipe(smollm2_path(), train_file, held_out, folder / "run", steps, "auto", "cpu")
    return train(recipe).output_dir / "adapter"


def truths(adapter: Path | None, tokens: int) -> list[Truth]:
    model = lorax.load_model(smollm2_path(), "float32")
    tokenizer = lorax.load_tokenizer(smollm2_path())
    if adapter is not None:
        lorax.load_adapter(model, adapter)
    return [truth(model, tokenizer, question, tokens) for question in QUESTIONS]


@torch.no_grad()
def truth(model: Any, tokenizer: Any, question: str, tokens: int) -> Truth:
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True))
    cache = model.new_cache(1, len(ids) + tokens)
    logits = model(torch.tensor([ids]), cache)[0, -1]
    logp, greedy = logits.log_softmax(-1), [int(logits.argmax())]
    while len(greedy) < tokens and greedy[-1] not in tokenizer.end_token_ids:
        greedy.append(int(model(torch.tensor([greedy[-1:]]), cache)[0, -1].argmax()))
    return Truth(ids, logp, greedy)


def server(model: Path, adapter: Path | None) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(model), 512, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def answered(there: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What llama.cpp says of each token that it wrote."""
    return there.handle_completions(request)["choices"][0]["logprobs"]["content"]


def measure(there: Any, expected: list[Truth]) -> dict[str, Any]:
    apart, nats, same, made = 0.0, 0.0, 0, 0
    for truth in expected:
        V = len(truth.logp)
        request = {"prompt": truth.ids, "temperature": 0.0, "cache_prompt": False}
        first = answered(there, request | {"n_predict": 1, "n_probs": V})
        logp = torch.full((V,), float("nan"))
        for entry in first[0]["top_logprobs"]:
            logp[entry["id"]] = entry["logprob"]
        apart = max(apart, float((logp - truth.logp).abs().max()))
        nats += float((truth.logp.exp() * (truth.logp - logp)).sum()) / len(expected)
        tokens = answered(there, request | {"n_predict": len(truth.greedy), "n_probs": 1})
        found = [entry["id"] for entry in tokens]
        same += sum(a == b for a, b in zip(found, truth.greedy, strict=False))
        made += len(truth.greedy)
    return {"log_p_apart": apart, "kl_nats": nats, "same_tokens": same, "tokens": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = options.adapter or trained(folder, options.steps)
        expected = {used: truths(adapter if used else None, options.tokens) for used in (0, 1)}
        for case, (kind, type, lora) in CASES.items():
            source = smollm2_path() if kind == "base" else adapter
            model, beside = folder / f"{kind}-{type}.gguf", folder / f"adapter-{lora}.gguf"
            over = {} if kind == "base" else {"base": smollm2_path(), "dtype": "float32",
                                              "quantization": "none"}  # fmt: skip
            if not model.exists():
                export(source, model, "gguf", type, **over)
            if lora:
                export(adapter, beside, "gguf-adapter", lora, base=smollm2_path(),
                       dtype="float32", quantization="none")  # fmt: skip
            used = kind == "merged" or lora is not None
            rows[case] = measure(server(model, beside if lora else None), expected[used])
            rows[case]["bytes"] = (beside if lora else model).stat().st_size
            print(case, rows[case], flush=True)
            if kind == "merged":
                model.unlink()
    content = {"machine": sides.machine(*PACKAGES), "prompts": len(QUESTIONS), "rows": rows}
    print(sides.write_results(NAME, content))


if __name__ == "__main__":
    main()
