"""What lorax exports, in llama.cpp itself: the next token's probabilities, all of them.

The package xllamacpp brings llama.cpp as a wheel. It is an oracle and no dependency: without it
these tests are skipped.
"""

import pytest
import torch
from families import family
from oracles import llama, mistral, peft_model
from test_gguf_vocabulary import meta_llama3, pieces, qwen2, smollm, wrapped
from tiny_tokenizer import CHATML

import lorax
from lorax.formats.gguf_adapter import export_adapter
from lorax.formats.gguf_export import export_model

llamacpp = pytest.importorskip("xllamacpp")

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOKENIZERS = {"smollm": smollm, "llama 3": meta_llama3, "qwen2": qwen2, "llama 2": pieces}
ROPE_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
BASES = {
    "llama": llama,
    "llama 3.1": lambda **c: llama(rope_parameters=ROPE_31, **c),
    "mistral": mistral,
    "qwen2": lambda **c: family("qwen2", **c),
    "qwen3": lambda **c: family("qwen3", **c),
    "gemma2": lambda **c: family("gemma2", **(c | {"query_pre_attn_scalar": 16})),
    "gemma3": lambda **c: family("gemma3_text", **(c | {"query_pre_attn_scalar": 16})),
    "phi3": lambda **c: family("phi3", **c),
}
ADAPTERS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"k_proj": 5},
    },
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
}
CLOSE = 1e-4  # of log probabilities, where weights, products and cache are float32
GELU = 5e-3  # the same for a Gemma: ggml looks gelu up in a table of float16


def server(model, adapter=None):
    params = llamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = llamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [llamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return llamacpp.Server(params)


def next_token(server, prompt, tokenizer):
    """log p of every token behind these ids, or behind a text: (vocabulary,).

    llama.cpp says nothing of a token that is the half of a character, so it is made to write an
    "a"; the probabilities are those from before that.
    """
    vocabulary = tokenizer.vocab_size
    forced = [[tokenizer.backend.token_to_id("a"), 1000.0]]
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": vocabulary}
    found = server.handle_completions(request | {"logit_bias": forced})
    listed = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len({entry["id"] for entry in listed}) == vocabulary
    result = torch.empty(vocabulary)
    for entry in listed:
        result[entry["id"]] = entry["logprob"]
    return result


def expected(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].float().log_softmax(-1)


def place(folder, base, tokenizer, **changes):
    """lorax's model of a random base, its GGUF in F32, and transformers' own."""
    source = BASES[base](vocab_size=tokenizer.vocab_size, **WIDE, **changes)
    source.save_pretrained(folder / "base")
    model = lorax.load_model(folder / "base")
    export_model(model, folder / "base.gguf", tokenizer, "F32")
    return model, source


@pytest.mark.parametrize("base", BASES)
def test_a_model_against_llamacpp(base, tmp_path):
    tokenizer = wrapped(smollm())
    model, _ = place(tmp_path, base, tokenizer)
    ids = [5, 20, 33, 100, 200, 7, 9]
    found = next_token(server(tmp_path / "base.gguf"), ids, tokenizer)
    bound = GELU if base.startswith("gemma") else CLOSE
    assert (found - expected(model, ids)).abs().max() <= bound


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_against_llamacpp(adapter, tmp_path):
    tokenizer = wrapped(smollm())
    model, source = place(tmp_path, "llama", tokenizer, tie_word_embeddings=False)
    peft = peft_model(source, r=4, lora_alpha=6, **ADAPTERS[adapter])
    peft.save_pretrained(tmp_path / "adapter")
    lorax.load_adapter(model, tmp_path / "adapter")
    export_adapter(model, tmp_path / "adapter.gguf")
    ids = [5, 20, 33, 100, 200, 7, 9]
    found = next_token(server(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), ids, tokenizer)
    with lorax.disabled_adapter(model):
        assert (found - expected(model, ids)).abs().max() > 100 * CLOSE, "the adapter does nothing"
    assert (found - expected(model, ids)).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_are_cut_as_llamacpp_cuts_them(kind, tmp_path):
    tokenizer = wrapped(TOKENIZERS[kind](), chat_template=CHATML)
    model, _ = place(tmp_path, "llama", tokenizer)
    there = server(tmp_path / "base.gguf")
    for text in ("the sea is 12 wide", "two  spaces\n\nlines", "Gr\u00fc\u00dfe, it's 2024!"):
        found = next_token(there, text, tokenizer)
        assert (found - expected(model, tokenizer.encode(text))).abs().max() <= CLOSE, text
