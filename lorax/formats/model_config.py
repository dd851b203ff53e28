"""config.json's content as a model's own config; what is not covered is refused by name.

Files come in several dialects: of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
of 5 (`rope_parameters`, `dtype`), under GPT-2's own names (`n_embd`) or the common ones
(`hidden_size`), and short ones, whose missing keys mean the defaults of transformers' classes. Each
means here what it means to transformers. Dropout (`attention_dropout`, `attn_pdrop`, `resid_pdrop`,
`embd_pdrop`) is read by nobody: lorax computes without it, in training too.
"""

from typing import Any

import torch

from lorax.errors import FormatError, UnsupportedModel
from lorax.formats.rope_config import read_rope
from lorax.formats.values import flag, number, size
from lorax.models import Model
from lorax.models.activations import ACTIVATIONS
from lorax.models.gpt2 import GPT2, GPT2Config
from lorax.models.llama import Llama, LlamaConfig

ModelConfig = LlamaConfig | GPT2Config

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# What a missing key means: the defaults of transformers' LlamaConfig, MistralConfig, GPT2Config.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}
# The common names of GPT-2's sizes; where both stand, transformers takes these.
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(found: dict[str, Any], where: str) -> ModelConfig:
    """Translate config.json's content.

    Raises:
        UnsupportedModel: the model type or one of its options is not covered.
        FormatError: the value of a key is impossible.
    """
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UnsupportedModel(
            f"{where}: model_type {kind!r} is not covered; lorax loads {', '.join(DEFAULTS)}"
        )
    if isinstance(found.get("text_config"), dict):
        raise UnsupportedModel(
            f"{where}: text_config is a model inside a model, which is not covered; "
            "save the language model alone, by its own save_pretrained"
        )
    values = {**DEFAULTS[kind], **found}
    if kind == "gpt2":
        values |= {key: found[alias] for alias, key in GPT2_ALIASES.items() if alias in found}
        return _read_gpt2(values, where)
    return _read_llama(values, kind, where)


def stated_dtype(found: dict[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, in either dialect, if lorax computes in it."""
    return DTYPES.get(str(found.get("dtype") or found.get("torch_dtype")))


def new_model(config: ModelConfig) -> Model:
    """The model without memory: every parameter on the meta device, frozen, in eval mode."""
    with torch.device("meta"):
        model: Model = GPT2(config) if isinstance(config, GPT2Config) else Llama(config)
    return model.requires_grad_(False).eval()


def _read_llama(values: dict[str, Any], kind: str, where: str) -> LlamaConfig:
    hidden = size(values, "hidden_size", where)
    heads = size(values, "num_attention_heads", where)
    kv_heads = size(values, "num_key_value_heads", where, null=heads)
    head_dim = size(values, "head_dim", where, null=hidden // heads)
    if heads % kv_heads or head_dim % 2 or heads * head_dim > 2**27:
        raise FormatError(
            f"{where}: {heads} heads over {kv_heads} key heads of width {head_dim} do not fit"
        )
    is_mistral = kind == "mistral"  # whose Linears have no biases, whatever the config says
    has_window = is_mistral and values["sliding_window"] is not None
    return LlamaConfig(
        vocab_size=size(values, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=size(values, "intermediate_size", where),
        num_hidden_layers=size(values, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(values, "rms_norm_eps", where),
        max_position_embeddings=size(values, "max_position_embeddings", where),
        tie_word_embeddings=flag(values, "tie_word_embeddings", where),
        attention_bias=not is_mistral and flag(values, "attention_bias", where),
        mlp_bias=not is_mistral and flag(values, "mlp_bias", where),
        hidden_act=_activation(values, "hidden_act", where),
        sliding_window=size(values, "sliding_window", where) if has_window else None,
        **read_rope(values, head_dim, where),
    )


def _read_gpt2(values: dict[str, Any], where: str) -> GPT2Config:
    width = size(values, "n_embd", where)
    heads = size(values, "n_head", where)
    if width % heads:
        raise FormatError(f"{where}: n_embd {width} is no multiple of n_head {heads}")
    if flag(values, "add_cross_attention", where):
        raise UnsupportedModel(f"{where}: add_cross_attention is not covered")
    return GPT2Config(
        vocab_size=size(values, "vocab_size", where),
        n_positions=size(values, "n_positions", where),
        n_embd=width,
        n_layer=size(values, "n_layer", where),
        n_head=heads,
        n_inner=size(values, "n_inner", where, null=4 * width),
        layer_norm_epsilon=number(values, "layer_norm_epsilon", where),
        tie_word_embeddings=flag(values, "tie_word_embeddings", where),
        activation_function=_activation(values, "activation_function", where),
        scale_attn_weights=flag(values, "scale_attn_weights", where),
        scale_attn_by_inverse_layer_idx=flag(values, "scale_attn_by_inverse_layer_idx", where),
    )


def _activation(values: dict[str, Any], key: str, where: str) -> str:
    name = values[key]
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{where}: {key} {name!r} is not covered; lorax has {', '.join(ACTIVATIONS)}"
        )
    return name
