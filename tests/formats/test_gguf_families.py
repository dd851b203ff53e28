"""GGUF files of Qwen 2 and 3, Gemma 2 and 3 and Phi-3, as llama.cpp's converter lays them out.

transformers reads them, too, and is the oracle where its reading is right; its own random model,
which the file was written from, is the truth.
"""

import numpy as np
import pytest
import torch
from families import family
from oracles import tokens

import lorax
from lorax.errors import UnsupportedModel

TINY = 1e-5
# What each converter writes beside a Llama's names: here -> there.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm"}
CASES = {
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "phi3": {},
}


def write_gguf(path, model, arch, **fields):
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if hasattr(config, "head_dim"):
        writer.add_key_length(config.head_dim)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "phi3":
        writer.add_sliding_window(0)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in fields.items():
        writer.add_uint32(f"{arch}.{key}", value)
    for name, tensor in model.state_dict().items():
        there = gguf_name(name, NAMES | (GEMMA if arch.startswith("gemma") else {}))
        if there is not None:
            shift = 1.0 if arch.startswith("gemma") and "norm" in name else 0.0
            writer.add_tensor(there, np.ascontiguousarray((tensor.float() + shift).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name, names):
    below, _, parameter = name.removeprefix("model.").rpartition(".")
    if below == "lm_head":
        return "output.weight"
    if not below.startswith("layers."):
        return f"{OUTSIDE[below]}.{parameter}"
    _, layer, part = below.split(".", 2)
    return f"blk.{layer}.{names[part]}.{parameter}"


def test_the_names_here_are_those_of_the_gguf_package():
    import gguf

    for arch in ("QWEN2", "QWEN3", "GEMMA2", "GEMMA3", "PHI3"):
        kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[arch]]
        known = {gguf.TENSOR_NAMES[kind].rpartition(".")[2] for kind in kinds}
        parts = {"attn_q", "attn_output", "ffn_up", "ffn_down", "attn_norm"}
        assert parts <= known
        assert not arch.startswith("GEMMA") or set(GEMMA.values()) <= known


@pytest.mark.parametrize("kind", CASES)
def test_logits_against_the_model_it_was_written_from(kind, tmp_path):
    theirs = family(kind, **CASES[kind], tie_word_embeddings=kind.startswith("gemma"))
    state = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
        theirs.state_dict = lambda: state
    write_gguf(tmp_path / "m.gguf", theirs, kind.removesuffix("_text"))
    mine = lorax.load_model(tmp_path / "m.gguf")
    ids = tokens(length=60)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (mine(ids) - expected).abs().max() <= TINY
        lorax.save_model(mine, tmp_path / "saved")
        assert (lorax.load_model(tmp_path / "saved")(ids) - expected).abs().max() <= TINY


@pytest.mark.parametrize(
    ("kind", "fields", "word"),
    [
        ("phi3", {"rope.dimension_count": 4}, "rotations of 4 of 8 values"),
        ("qwen2", {"expert_count": 4}, "expert_count"),
        ("gemma3_text", {"rope.scaling.type": 1}, "rope.scaling.type"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(kind, fields, word, tmp_path):
    write_gguf(tmp_path / "m.gguf", family(kind), kind.removesuffix("_text"), **fields)
    with pytest.raises(UnsupportedModel, match=word):
        lorax.load_model(tmp_path / "m.gguf")


def test_another_architecture_is_refused_with_the_list(tmp_path):
    write_gguf(tmp_path / "m.gguf", family("qwen2"), "mamba")
    with pytest.raises(
        UnsupportedModel, match="llama, qwen2, qwen3, gemma2, gemma3, phi3 are read"
    ):
        lorax.load_model(tmp_path / "m.gguf")
