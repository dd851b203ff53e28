"""Writes tests/golden/before with the lorax of commit 930bfd5: see the README beside the results.

    cd tests/golden/before
    PYTHONPATH=OLD/tests OLD/.venv/bin/python ../make_before.py

OLD is a worktree of that commit with an environment in which its own lorax is installed. Today's
code must never run this: what it reads is what that version left.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_tokenizer import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorax
from lorax.formats.optimizer_files import save_optimizer_state
from lorax.formats.quantize_model import quantize_model
from lorax.formats.tokenizer_files import write_tokenizer

IDS = torch.tensor([[5, 40, 80, 120, 7, 200, 33, 90]])
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
ADAPTERS = {
    "lora": ("llama", None, LORA),
    "lora-gpt2": ("gpt2", None, LORA),
    "lora-nf4": ("llama", "nf4", LORA),
    "rslora": ("llama", None, LORA | {"use_rslora": True, "lora_bias": True}),
    "dora": ("llama", None, LORA | {"use_dora": True}),
    "pissa": ("llama", None, LORA | {"init_lora_weights": "pissa"}),
    "olora": ("llama", None, LORA | {"init_lora_weights": "olora"}),
    "loftq": ("llama", None, LORA | {
        "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
    "embedding": ("llama", None, LORA | {"target_modules": ["embed_tokens", "q_proj"]}),
    "beside": ("llama", None, LORA | {
        "target_modules": ["q_proj"], "modules_to_save": ["down_proj"],
        "trainable_token_indices": [3, 7]}),
    "bias": ("gpt2", None, LORA | {"bias": "all"}),
}  # fmt: skip
RUNS = {
    "run-lora": {**LORA},
    "run-qlora": {**LORA},
    "run-adalora": {
        "method": "adalora", "init_r": 3, "target_r": 2, "lora_alpha": 4, "tinit": 1, "tfinal": 2,
        "deltaT": 1, "target_modules": "all-linear"},
    "run-prompt": {"method": "prompt-tuning", "num_virtual_tokens": 3},
    "run-full": {"method": "full"},
}  # fmt: skip
EXPECTED = "expected.safetensors"
FORMATS = ("nf4", "nf4-dq", "fp4", "int8")


def bases():
    """A Llama and a GPT-2 of width 16, with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    llama = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=size, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
        move(model, 0.1)
        model.save_pretrained(name)
        Path(name, "generation_config.json").unlink()
    write_tokenizer(tokenizer, Path("llama"))
    rows = (f'{{"prompt": "say {"a" * n} ", "completion": "{"b" * n}"}}\n' for n in range(1, 9))
    Path("rows.jsonl").write_text("".join(rows))


def move(model, by):
    """Every trainable value away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def last_logits(model):
    """(vocab,) float32, after the last token."""
    with torch.no_grad():
        return model(IDS)[0, -1].float().clone()


def adapters(expected):
    for name, (base, quantization, settings) in ADAPTERS.items():
        torch.manual_seed(2)
        model = lorax.load_model(base, "float32", quantization=quantization)
        lorax.add_adapter(model, lorax.LoRAConfig(**settings))
        move(model, 0.2)
        lorax.save_adapter(model, name)
        expected[name] = last_logits(model)


def runs(expected):
    for name, adapter in RUNS.items():
        quantization = {"quantization": "nf4-dq"} if name == "run-qlora" else {}
        run = lorax.train(lorax.Recipe.from_dict({
            "model": {"path": "llama", "dtype": "float32", **quantization},
            "adapter": adapter,
            "data": {"path": "rows.jsonl", "eval_fraction": 0.25, "max_length": 32},
            "train": {"output_dir": name, "max_steps": 4, "batch_size": 3, "micro_batch_size": 3,
                      "learning_rate": 0.02},
        }))  # fmt: skip
        expected[name] = last_logits(run.model)
        Path(name, "loss.png").unlink()  # 30 kB each, and no program reads it


def quantized_copies(expected):
    for name in FORMATS:
        quantize_model("llama", Path(f"copy-{name}"), name, dtype="float32")
        expected[f"copy-{name}"] = last_logits(lorax.load_model(f"copy-{name}", "float32"))
        if name != "nf4":
            Path(f"copy-{name}", "tokenizer.json").unlink()  # nf4's is kept as an example


def optimizer_state(expected):
    """Two steps of the 8-bit AdamW, its state, and where the third step leads."""
    torch.manual_seed(4)
    start, gradients = torch.randn(8, 64), torch.randn(3, 8, 64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = lorax.optim.AdamW8bit([weight], lr=0.01, block_size=256, min_8bit_size=256)
    for step, gradient in enumerate(gradients):
        if step == 2:
            save_optimizer_state(optimizer.state_dict(), Path("optimizer-8bit.safetensors"))
            expected["optimizer.before"] = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    expected["optimizer.gradient"], expected["optimizer.after"] = gradients[2], weight.detach()


def main():
    for old in Path().iterdir():
        if old.name != "README.md":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    expected = {}
    bases()
    for make in (adapters, runs, quantized_copies, optimizer_state):
        make(expected)
    save_file(
        {name: value.contiguous() for name, value in expected.items()}, "expected.safetensors"
    )


if __name__ == "__main__":
    main()
