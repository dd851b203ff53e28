"""config.json and the models' own configs, both ways; what is not covered is refused by name."""

import dataclasses
import math
from typing import Any

import torch

from lorax.errors import FormatError, UnsupportedModel
from lorax.models import Model
from lorax.models.gpt2 import GPT2, GPT2Config
from lorax.models.llama import Llama, Llama3Scaling, LlamaConfig

ModelConfig = LlamaConfig | GPT2Config

MODEL_TYPES = ("llama", "mistral", "gpt2")
_MAX_LAYERS = 10_000  # far above any model; a config from a stranger may ask for anything
_MAX_SIZE = 2**27
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Options that change the result and that the models do not have: any other value is refused.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0, None)},
    "mistral": {"hidden_act": ("silu", "swish"), "sliding_window": (None,)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096}
}  # what a missing key means there


def read_config(found: dict[str, Any], where: str) -> ModelConfig:
    """Translate config.json's content.

    Raises:
        UnsupportedModel: the model type or one of its options is not covered.
        FormatError: a key is missing, or its value is impossible.
    """
    kind = found.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedModel(
            f"{where}: model_type {kind!r} is not covered; lorax loads {', '.join(MODEL_TYPES)}"
        )
    for key, allowed in _ONLY[kind].items():
        value = found.get(key, _DEFAULTS.get(kind, {}).get(key, allowed[0]))
        if value not in allowed:
            raise UnsupportedModel(
                f"{where}: {key} = {value!r} is not covered for {kind}; only {allowed[0]!r} is"
            )
    return _read_gpt2(found, where) if kind == "gpt2" else _read_llama(found, where)


def write_config(model: Model) -> dict[str, Any]:
    """Give config.json's content for a model as it stands (its dtype, its tied head or not)."""
    config = model.config
    embedding = model.get_parameter(model.embedding_name)
    fields = dataclasses.asdict(config)
    fields["tie_word_embeddings"] = is_tied(model)
    dtype = str(embedding.dtype).removeprefix("torch.")
    if isinstance(config, GPT2Config):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            **fields,
            "torch_dtype": dtype,
        }
    rope: dict[str, Any] | None = None
    if config.llama3_scaling is not None:
        rope = {"rope_type": "llama3", **dataclasses.asdict(config.llama3_scaling)}
    elif config.rope_factor != 1.0:
        rope = {"rope_type": "linear", "factor": config.rope_factor}
    del fields["llama3_scaling"], fields["rope_factor"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **fields,
        "rope_scaling": rope,
        "torch_dtype": dtype,
    }


def is_tied(model: Model) -> bool:
    """Whether the head is the embedding; a head that was quantized is not."""
    weight = getattr(model.lm_head, "weight", None)
    return weight is model.get_parameter(model.embedding_name)


def stated_dtype(found: dict[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, in either dialect, if lorax computes in it."""
    return DTYPES.get(str(found.get("dtype") or found.get("torch_dtype")))


def new_model(config: ModelConfig) -> Model:
    """The model without memory: every parameter on the meta device, frozen, in eval mode."""
    with torch.device("meta"):
        model: Model = GPT2(config) if isinstance(config, GPT2Config) else Llama(config)
    return model.requires_grad_(False).eval()


def _read_llama(found: dict[str, Any], where: str) -> LlamaConfig:
    hidden = _size(found, "hidden_size", where)
    heads = _size(found, "num_attention_heads", where)
    kv_heads = _size(found, "num_key_value_heads", where, heads)
    head_dim = _size(found, "head_dim", where, hidden // heads)
    if heads % kv_heads or head_dim % 2 or heads * head_dim > _MAX_SIZE:
        raise FormatError(
            f"{where}: {heads} heads over {kv_heads} key heads of width {head_dim} do not fit"
        )
    return LlamaConfig(
        vocab_size=_size(found, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_size(found, "intermediate_size", where),
        num_hidden_layers=_size(found, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(found, "rms_norm_eps", where, 1e-6),
        max_position_embeddings=_size(found, "max_position_embeddings", where, 2048),
        tie_word_embeddings=_flag(found, "tie_word_embeddings", where, False),
        attention_bias=_flag(found, "attention_bias", where, False),
        mlp_bias=_flag(found, "mlp_bias", where, False),
        **_read_rope(found, where),
    )


def _read_rope(found: dict[str, Any], where: str) -> dict[str, Any]:
    """Both dialects: rope_parameters (transformers 5), or rope_theta and rope_scaling."""
    new = found.get("rope_parameters")
    rope = new if isinstance(new, dict) else (found.get("rope_scaling") or {})
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: rope_scaling must be an object, found {rope!r}")
    holder = rope if "rope_theta" in rope else found
    result: dict[str, Any] = {"rope_theta": _number(holder, "rope_theta", where, 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModel(f"{where}: a partial_rotary_factor is not covered")
    if kind == "linear":
        result["rope_factor"] = _number(rope, "factor", where)
    elif kind == "llama3":
        result["llama3_scaling"] = Llama3Scaling(
            factor=_number(rope, "factor", where),
            low_freq_factor=_number(rope, "low_freq_factor", where),
            high_freq_factor=_number(rope, "high_freq_factor", where),
            original_max_position_embeddings=_size(rope, "original_max_position_embeddings", where),
        )
    elif kind != "default":
        raise UnsupportedModel(
            f"{where}: rope_type {kind!r} is not covered; default, linear and llama3 are"
        )
    return result


def _read_gpt2(found: dict[str, Any], where: str) -> GPT2Config:
    width = _size(found, "n_embd", where, 768)
    heads = _size(found, "n_head", where, 12)
    if width % heads:
        raise FormatError(f"{where}: n_embd {width} is no multiple of n_head {heads}")
    return GPT2Config(
        vocab_size=_size(found, "vocab_size", where, 50257),
        n_positions=_size(found, "n_positions", where, 1024),
        n_embd=width,
        n_layer=_size(found, "n_layer", where, 12),
        n_head=heads,
        n_inner=_size(found, "n_inner", where, 4 * width),
        layer_norm_epsilon=_number(found, "layer_norm_epsilon", where, 1e-5),
        tie_word_embeddings=_flag(found, "tie_word_embeddings", where, True),
    )


def _size(found: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = found.get(key)
    value = default if value is None else value
    limit = _MAX_LAYERS if key in ("num_hidden_layers", "n_layer") else _MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise FormatError(
            f"{where}: {key} must be a whole number from 1 to {limit}, found {value!r}"
        )
    return value


def _number(found: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = found.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise FormatError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)


def _flag(found: dict[str, Any], key: str, where: str, default: bool) -> bool:
    value = found.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise FormatError(f"{where}: {key} must be true or false, found {value!r}")
    return value
