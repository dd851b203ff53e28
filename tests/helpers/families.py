"""Tiny random models of the families beside Llama, Mistral and GPT-2, as transformers makes them.

Three layers or more, so that each pattern of windows shows, and every size unlike its default.
"""

from typing import Any

import torch
import transformers
from oracles import LLAMA

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 9, "num_hidden_layers": 4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
# name -> model_type, and what differs from LLAMA's sizes
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2: window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2: yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3: bias, window": (
        "qwen3",
        {
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma2: no caps, untied": (
        "gemma2",
        GEMMA
        | {
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma2: strong caps": (
        "gemma2",
        GEMMA | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    ),
    "gemma3_text": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "gemma3_text: stretched": (
        "gemma3_text",
        GEMMA
        | {
            "final_logit_softcapping": 3.0,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3: window": ("phi3", {"sliding_window": 6, "tie_word_embeddings": True}),
    "phi3: longrope": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    ),
    "phi3: part of a head": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
}
PLAIN = ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def family(kind: str, **changes: Any) -> Any:
    """The random model of that kind, all of whose parameters move the logits."""
    model_type, options = KINDS[kind]
    torch.manual_seed(0)
    settings = {**LLAMA, **SPECIALS, **options, **changes}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)  # as in oracles.randomize
            else:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model
