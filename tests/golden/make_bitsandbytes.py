"""Writes the golden checkpoints beside this file, with the installed transformers and bitsandbytes.

    python tests/golden/make_bitsandbytes.py

Each is what `save_pretrained` leaves, plus `dequantized.safetensors`: the Linears' weights decoded
by bitsandbytes' own rule from its own tensors. The weights behind them come from whole-number
arithmetic (`weight`), so that any machine and any version of torch can make them again.
"""

import logging
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
# name -> (architecture, what BitsAndBytesConfig gets, dtype)
GOLDEN = {
    "llama-nf4-dq": (
        "llama",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        torch.bfloat16,
    ),
    "gpt2-fp4": (
        "gpt2",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
        torch.float16,
    ),
    "gpt2-int8": ("gpt2", {"load_in_8bit": True}, torch.float32),
}
SIZES = {
    "llama": {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    },
    "gpt2": {"vocab_size": 40, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4,
             "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Nearly normal float32 values with a spread of 0.13, the same everywhere: sums of 4 hashes."""
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(name))
    n = torch.Size(shape).numel()
    x = (torch.arange(4 * n, dtype=torch.int64) + seed * 1_000_003) & 0xFFFF_FFFF
    for _ in range(3):  # a hash in 32 bits; products stay below 2^59
        x = (x ^ (x >> 16)) * 73_244_475 & 0xFFFF_FFFF
    total = (x >> 16).view(4, n).sum(dim=0) - 2 * 65_535  # exact in float32
    return (total.float() / 2**18).view(shape)


def plain_model(kind: str):
    """The model before quantization, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES[kind]))
        if kind == "llama"
        else GPT2LMHeadModel(GPT2Config(**SIZES[kind]))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
    return model.eval()


def decoded(module) -> torch.Tensor:
    """A bitsandbytes Linear's weight by the format's rule: code * scale, rounded once at the end.

    Not by its own CPU kernel, which is wrong where rows are no multiple of the block.
    """
    import bitsandbytes.functional as bnb

    packed, state = module.weight.data, getattr(module.weight, "quant_state", None)
    if state is None:
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return bnb.int8_vectorwise_dequant(packed, scales)
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    raw = packed.contiguous().view(torch.uint8).flatten()
    n = state.shape.numel()
    codes = torch.stack([raw >> 4, raw & 15], dim=1).flatten()[:n].long()
    values = state.code[codes] * scales.repeat_interleave(state.blocksize)[:n]
    return values.to(state.dtype).view(state.shape)


def quantized_linears(model) -> dict:
    """bitsandbytes' Linears in a transformers model, by path."""
    kinds = ("Linear4bit", "Linear8bitLt")
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds}


def make(name: str, directory: Path) -> None:
    """Write one golden checkpoint into `directory`."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind, settings, dtype = GOLDEN[name]
    with tempfile.TemporaryDirectory() as plain:
        plain_model(kind).save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**settings), dtype=dtype
        )
    model.save_pretrained(directory)
    weights = {f"{n}.weight": decoded(m).contiguous() for n, m in quantized_linears(model).items()}
    save_file(weights, directory / "dequantized.safetensors", metadata={"format": "pt"})
    for path in directory.iterdir():
        if path.name not in ("config.json", "model.safetensors", "dequantized.safetensors"):
            path.unlink()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for golden in GOLDEN:
        make(golden, HERE / golden)
    print(sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()), "bytes in all")
