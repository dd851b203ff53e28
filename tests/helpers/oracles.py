"""Tiny random models as transformers makes them, and PEFT adapters on them: the oracles."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Every kind that lorax says it covers: name -> what differs from LLAMA.
LLAMA_KINDS = {
    "grouped heads": {},
    "as many key heads": {"num_key_value_heads": 6},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "eps": {"rms_norm_eps": 1e-3},
}
GPT2 = {"vocab_size": 97, "n_positions": 256, "n_embd": 48, "n_layer": 3, "n_head": 4}
GPT2_KINDS = {
    "plain": {},
    "n_inner": {"n_inner": 100},
    "untied": {"tie_word_embeddings": False},
}


def randomize(model):
    """Give every parameter values large enough that nothing hides: norms and biases too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.15
            parameter.copy_(torch.randn_like(parameter) * spread)
            if name.endswith(("norm.weight", "layernorm.weight", "ln_1.weight", "ln_f.weight")):
                parameter.add_(1.0)
    return model.eval()


def llama(**changes):
    return randomize(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})))


def mistral(**changes):
    options = {**LLAMA, "sliding_window": None, **changes}
    return randomize(MistralForCausalLM(MistralConfig(**options)))


def gpt2(**changes):
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return randomize(GPT2LMHeadModel(GPT2Config(**{**GPT2, **dropouts, **changes})))


def peft_model(base, **config):
    """A PEFT model on a copy of `base`, its adapter random in A and in B."""
    settings = LoraConfig(task_type="CAUSAL_LM", **config)
    model = get_peft_model(copy.deepcopy(base), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(rows=2, length=19, vocabulary=97, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)
