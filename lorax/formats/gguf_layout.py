"""What GGUF and Hugging Face call the same things, for reading and for writing.

    blk.0.attn_q.weight             model.layers.0.self_attn.q_proj.weight
    llama.attention.head_count      num_attention_heads

What a family has beside a Llama's, its config says (`lorax.models.config.GGUFLayout`). A Llama's
rows of q and k are permuted, because ggml rotates neighbouring pairs (2i, 2i + 1) there, where
transformers rotates (i, i + D / 2):

    here    0  1  2 ... D - 1           there    0  D/2  1  D/2 + 1  2 ...
"""

from __future__ import annotations

from torch import Tensor

from lorax.models.config import GGUFLayout
from lorax.models.llama_config import LlamaConfig
from lorax.models.stretching import Llama3Scaling

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Metadata below the architecture's name -> config.json's keys.
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
ROPE_FACTORS = "rope_freqs.weight"
# The two settings of Llama 3.1 and 3.2, of which a GGUF keeps the outcome only.
LLAMA3 = (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192))


def hf_name(name: str, layout: GGUFLayout) -> str:
    """A tensor's name there -> here; one that is not known stays as it is."""
    if name in NAMES:
        return NAMES[name]
    parts = name.split(".")
    below = (LAYER_NAMES | dict(layout.names)).get(parts[2]) if len(parts) == 4 else None
    if below is not None and parts[0] == "blk":
        return f"model.layers.{parts[1]}.{below}.{parts[3]}"
    return name


def gguf_name(name: str, layout: GGUFLayout) -> str | None:
    """A tensor's name here -> there; None for one that has none."""
    for theirs, mine in NAMES.items():
        if mine == name:
            return theirs
    below, _, parameter = name.removeprefix("model.layers.").rpartition(".")
    layer, _, part = below.partition(".")
    names = {mine: theirs for theirs, mine in (LAYER_NAMES | dict(layout.names)).items()}
    return f"blk.{layer}.{names[part]}.{parameter}" if part in names else None


def permuted_heads(name: str, config: LlamaConfig, layout: GGUFLayout) -> int | None:
    """How many heads a tensor's rows are permuted in; None where they stay.

    name: here, a weight's or a bias's.
    """
    module = name.rpartition(".")[0].rpartition(".")[2] if layout.permutes else ""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module)


def permute(weight: Tensor, heads: int) -> Tensor:
    """Rows (n, ...) of each head from (0, 1, 2, ...) to (0, D/2, 1, D/2 + 1, ...)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows (n, ...) of each head from (0, D/2, 1, D/2 + 1, ...) back to (0, 1, 2, ...)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
