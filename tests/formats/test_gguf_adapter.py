"""Adapters as llama.cpp's file: alpha / r * B A, added in GGUF's own order, is the merged model.

Adapters are PEFT's. What llama.cpp does with such a file is done here with numpy, on the tensors of
the base's GGUF; test_llamacpp.py asks llama.cpp itself.
"""

import gguf
import numpy as np
import pytest
import torch
from families import family
from oracles import llama, mistral, peft_model

import lorax
from lorax.errors import AdapterError, FormatError, UnsupportedModel, UsageError
from lorax.formats.gguf_adapter import export_adapter
from lorax.formats.gguf_export import export_model

ALL = {"target_modules": "all-linear"}
PATTERN = {"rank_pattern": {"q_proj": 2, "down_proj": 8}}
BASES = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "tied": lambda: llama(tie_word_embeddings=True),
    "mistral": mistral,
    "qwen2": lambda: family("qwen2"),
    "qwen3": lambda: family("qwen3"),
    "gemma2": lambda: family("gemma2", query_pre_attn_scalar=8),
    "gemma3": lambda: family("gemma3_text", query_pre_attn_scalar=8),
    "phi3": lambda: family("phi3"),
}
CASES = {
    **{name: (name, {"r": 4, "lora_alpha": 6, **ALL}) for name in BASES},
    "rslora": ("llama", {"r": 4, "lora_alpha": 6, "use_rslora": True, **ALL}),
    "rslora, an odd rank": ("tied", {"r": 3, "lora_alpha": 6, "use_rslora": True, **ALL}),
    "rank_pattern": ("llama", {"r": 4, "lora_alpha": 6, **PATTERN, **ALL}),
    "alpha_pattern": ("llama", {"r": 4, "alpha_pattern": {"k_proj": 5, "v_proj": 16}, **ALL}),
    "rslora and patterns": ("llama", {"r": 4, "use_rslora": True, **PATTERN, **ALL}),
    "pissa": ("llama", {"r": 4, "init_lora_weights": "pissa", **ALL}),
    "a head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "an embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
}  # fmt: skip


def adapted(folder, base, settings):
    """lorax's model with the adapter that PEFT made, moved and saved."""
    source = BASES[base]()
    source.save_pretrained(folder / "base")
    peft = peft_model(source, **settings)
    peft.save_pretrained(folder / "adapter")
    model = lorax.load_model(folder / "base")
    lorax.load_adapter(model, folder / "adapter")
    return model


def tensors(path):
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def as_llamacpp_adds(base, path):
    """The base's tensors with alpha / r * B A added; embeddings have A as rows."""
    alpha, parts, found = fields(path)["adapter.lora.alpha"], tensors(path), dict(base)
    for name in {part.rpartition(".")[0] for part in parts}:
        A, B = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        scale = np.float32(alpha) / np.float32(B.shape[1])
        delta = A @ B.T if name.startswith("token_embd") else B @ A
        found[name] = base[name] + scale * delta
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_file_over_the_base_is_the_merged_model(case, tmp_path):
    model = adapted(tmp_path, *CASES[case])
    written = export_adapter(model, tmp_path / "adapter.gguf")
    export_model(lorax.load_model(tmp_path / "base"), tmp_path / "base.gguf", type="F32")
    export_model(lorax.unload_adapter(model, merge=True), tmp_path / "merged.gguf", type="F32")
    base, merged = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "merged.gguf")
    found = as_llamacpp_adds(base, tmp_path / "adapter.gguf")
    assert found.keys() == merged.keys()
    changed = [name for name in merged if not np.array_equal(merged[name], base[name])]
    assert len(changed) * 2 == len(written)
    for name, expected in merged.items():
        assert np.abs(found[name] - expected).max() <= 2e-6, name


def test_what_is_written_is_peft_s_a_and_b_bit_for_bit(tmp_path):
    for case, alpha in (("qwen2", 6.0), ("rank_pattern", 6.0), ("rslora", 12.0)):
        folder = tmp_path / case
        model = adapted(folder, *CASES[case])
        export_adapter(model, folder / "adapter.gguf")
        about = fields(folder / "adapter.gguf")
        assert about["adapter.lora.alpha"] == alpha
        assert (about["general.type"], about["adapter.type"]) == ("adapter", "lora")
        assert about["general.architecture"] == ("qwen2" if case == "qwen2" else "llama")
        found = tensors(folder / "adapter.gguf")
        layer = model.model.layers[1].mlp.down_proj
        assert np.array_equal(found["blk.1.ffn_down.weight.lora_a"], layer.lora_A.detach())
        assert np.array_equal(found["blk.1.ffn_down.weight.lora_b"], layer.lora_B.detach())


def test_adalora_is_folded_and_its_pruned_layers_left_out(tmp_path):
    source = llama()
    source.save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(model, lorax.AdaLoRAConfig(init_r=4, target_r=2, total_step=10))
    for layer in model.modules():
        if hasattr(layer, "lora_E"):
            with torch.no_grad():
                for tensor in layer.tensors().values():
                    tensor.normal_()
    model.model.layers[0].self_attn.q_proj.prune([False] * 4)
    model.model.layers[1].self_attn.q_proj.prune([True, False, True, True])
    export_adapter(model, tmp_path / "adapter.gguf")
    export_model(lorax.load_model(tmp_path / "base"), tmp_path / "base.gguf", type="F32")
    found = as_llamacpp_adds(tensors(tmp_path / "base.gguf"), tmp_path / "adapter.gguf")
    assert "blk.0.attn_q.weight.lora_a" not in tensors(tmp_path / "adapter.gguf")
    export_model(lorax.unload_adapter(model, merge=True), tmp_path / "merged.gguf", type="F32")
    for name, expected in tensors(tmp_path / "merged.gguf").items():
        assert np.abs(found[name] - expected).max() <= 1e-4, name


TWO = ["q_proj", "v_proj"]
REFUSED = {
    "dora": ("llama", {"use_dora": True}, r"q_proj has a lora_magnitude_vector.*\(DoRA\)"),
    "lora_bias": ("llama", {"lora_bias": True}, r"q_proj has a lora_B\.bias"),
    "biases": ("qwen2", {"bias": "all"}, r"q_proj\S*\.bias was trained"),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}, r"lm_head\.weight was trained"),
    "token rows": ("llama", {"trainable_token_indices": [1, 5]},
                   r"embed_tokens has a token_adapter.trainable_tokens_delta"),
    "a tied embedding": ("tied", {"target_modules": ["embed_tokens"]}, "embed_tokens is adapted"),
    "a tied head": ("tied", {"target_modules": ["lm_head"]}, "lm_head is adapted"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llamacpp_cannot_hold_is_refused_by_name(case, tmp_path):
    base, settings, word = REFUSED[case]
    model = adapted(tmp_path, base, {"r": 4, "target_modules": TWO, **settings})
    with pytest.raises(AdapterError, match=f"{word}.*--format gguf"):
        export_adapter(model, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_prompt_loftq_and_another_family_are_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base")
    with pytest.raises(AdapterError, match="no adapter"):
        export_adapter(model, tmp_path / "x.gguf")
    lorax.add_adapter(model, lorax.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(AdapterError, match=r"no .*[Pp]rompt"):
        export_adapter(model, tmp_path / "x.gguf")
    model = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, init_lora_weights="loftq"))
    with pytest.raises(AdapterError, match="LoftQ"):
        export_adapter(model, tmp_path / "x.gguf")
    model = adapted(tmp_path / "again", "llama", {"r": 2, "target_modules": TWO})
    lorax.merge_adapter(model)
    with pytest.raises(AdapterError, match="is merged"):
        export_adapter(model, tmp_path / "x.gguf")
    lorax.unmerge_adapter(model)
    with pytest.raises(UsageError, match="type 'Q8_0': expected one of F32, F16"):
        export_adapter(model, tmp_path / "x.gguf", "Q8_0")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_A[0, 0] = 1e5
    with pytest.raises(FormatError, match="q_proj: the adapter has a value that F16"):
        export_adapter(model, tmp_path / "x.gguf", "F16")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "again"}


def test_gpt2_is_refused(tmp_path):
    from oracles import gpt2

    gpt2().save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2))
    with pytest.raises(UnsupportedModel, match="a gpt2 is not written as GGUF"):
        export_adapter(model, tmp_path / "x.gguf")
