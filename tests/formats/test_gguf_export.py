"""Models written as GGUF: read again they are what they were, by lorax and by transformers.

Models are transformers' own random ones, saved and opened by lorax.
"""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import family
from oracles import LLAMA3_ROPE, gpt2, llama, mistral, tokens

import lorax
from lorax.errors import EnvironmentProblem, FormatError, UnsupportedModel, UsageError
from lorax.formats.gguf_export import export_model
from lorax.formats.gguf_layout import LAYER_NAMES, gguf_name, hf_name, permute, unpermute
from lorax.models.llama_config import LlamaConfig

# transformers' reader takes a head's width, or the scalar of the scores, for its default.
GEMMA = {"query_pre_attn_scalar": 256, "head_dim": 256}
ROPE_31 = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
MODELS = {
    "llama": lambda **c: llama(**c),
    "llama, tied, heads of their own width": lambda **c: llama(
        tie_word_embeddings=True, head_dim=16, **c
    ),
    "llama 3.1": lambda **c: llama(rope_parameters=ROPE_31, **c),
    "llama 3.2": lambda **c: llama(rope_parameters=ROPE_31 | {"factor": 32.0}, **c),
    "mistral": lambda **c: mistral(rms_norm_eps=1e-5, **c),
    "qwen2": lambda **c: family("qwen2", **c),
    "qwen2, tied": lambda **c: family("qwen2: tied", **c),
    "qwen3": lambda **c: family("qwen3", **({"head_dim": 128} | c)),
    "gemma2": lambda **c: family("gemma2", **GEMMA, **c),
    "gemma3_text": lambda **c: family("gemma3_text", **GEMMA, **c),
    "phi3": lambda **c: family("phi3", **c),
    "phi3, window, tied": lambda **c: family("phi3: window", **c),
}
# transformers 5.23 passes over rope_freqs.weight and a Phi-3's window, and computes without.
# Of a GGUF without a tokenizer it takes Phi-3's default pad token, which needs as many rows.
ROWS = {"phi3": {"vocab_size": 32064}}
PASSED_OVER = ("llama 3.1", "llama 3.2", "phi3, window, tied")
LAST_PLACE = 1e-5  # Gemma's norms have 1 added, which costs their last place


def opened(theirs, folder: Path):
    theirs.save_pretrained(folder)
    return lorax.load_model(folder)


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("kind", MODELS)
def test_float32_gives_the_same_logits_bit_for_bit(kind, tmp_path):
    mine = opened(MODELS[kind](), tmp_path / "hf")
    export_model(mine, tmp_path / "m.gguf", type="F32")
    again = lorax.load_model(tmp_path / "m.gguf")
    ids = tokens(length=40)
    apart = (logits(again, ids) - logits(mine, ids)).abs().max()
    assert apart <= (LAST_PLACE if kind.startswith("gemma") else 0)
    assert type(again) is type(mine)
    assert again.config.tie_word_embeddings == mine.config.tie_word_embeddings
    for name, parameter in again.named_parameters():
        if "norm" not in name:
            assert torch.equal(parameter, mine.get_parameter(name)), name


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in PASSED_OVER])
def test_transformers_opens_it_with_the_same_logits(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    source = MODELS[kind](**ROWS.get(kind, {}))
    mine = opened(source, tmp_path / "hf")
    export_model(mine, tmp_path / "m.gguf", type="F32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = tokens(length=40)
    assert (logits(theirs, ids) - logits(source, ids)).abs().max() <= LAST_PLACE


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("type", ["F16", "Q8_0"])
def test_matrices_are_rounded_as_their_type_says_and_norms_not_at_all(kind, type, tmp_path):
    mine = opened(MODELS[kind](**WIDE), tmp_path / "hf")
    export_model(mine, tmp_path / "m.gguf", type=type)
    again = lorax.load_model(tmp_path / "m.gguf", "float32")
    rounded = 0
    for name, parameter in again.named_parameters():
        was = mine.get_parameter(name)
        if parameter.dim() == 1:
            assert (parameter - was).abs().max() <= 1e-6, name
            continue
        rounded += not torch.equal(parameter, was)
        if type == "F16" or was.shape[1] % 32:
            expected = was.half().float()
        else:
            kind_of_type = gguf.GGMLQuantizationType[type]
            blocks = gguf.quants.quantize(was.numpy(), kind_of_type)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind_of_type))
            scale = was.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 127
            bound = scale * (0.5 + 127 * 2**-11) * 1.001  # half a step, and the scale's own F16
            assert ((expected - was).unflatten(1, (-1, 32)).abs() <= bound).all(), name
        assert torch.equal(parameter, expected), name
    assert rounded
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["token_embd.weight"] == type
    assert {t for name, t in stored.items() if "norm" in name or "bias" in name} == {"F32"}


def test_a_row_that_32_does_not_divide_is_f16_in_q8_0(tmp_path):
    mine = opened(llama(hidden_size=64, intermediate_size=72, num_attention_heads=8), tmp_path)
    export_model(mine, tmp_path / "m.gguf", type="Q8_0")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16"
    assert stored["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_quantized_model_is_written_decoded(tmp_path):
    llama().save_pretrained(tmp_path / "hf")
    mine = lorax.load_model(tmp_path / "hf", quantization="nf4-dq")
    export_model(mine, tmp_path / "m.gguf", type="F32")
    again = lorax.load_model(tmp_path / "m.gguf")
    ids = tokens()
    assert (logits(again, ids) - logits(mine, ids)).abs().max() <= 1e-5


def test_a_mistrals_window_bounds_the_context(tmp_path, caplog):
    mine = opened(mistral(sliding_window=24), tmp_path / "hf")
    export_model(mine, tmp_path / "m.gguf", type="F32")
    again = lorax.load_model(tmp_path / "m.gguf")
    assert again.config.max_position_embeddings == 24
    assert "context_length is the window's 24 tokens" in caplog.text
    ids = tokens(length=24)
    assert torch.equal(logits(again, ids), logits(mine, ids))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: llama(rope_parameters=LLAMA3_ROPE), "llama3_scaling"),
        (lambda: llama(attention_bias=True), "attention_bias"),
        (lambda: llama(mlp_bias=True), "mlp_bias"),
        (lambda: llama(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_factor"),
        (lambda: family("qwen2: window"), "sliding_window = 7"),
        (lambda: family("qwen2: yarn"), "yarn_scaling"),
        (lambda: family("qwen3: bias, window"), "attention_bias"),
        (lambda: family("gemma2"), "query_pre_attn_scalar = 12"),
        (lambda: family("gemma2: no caps, untied", **GEMMA), "attention_bias"),
        (lambda: family("gemma3_text: stretched", **GEMMA), "rope_factor = 8.0"),
        (lambda: family("phi3: longrope"), "longrope"),
        (lambda: family("phi3: part of a head"), "rotations of 4 of 8"),
        (lambda: gpt2(), "a gpt2 is not written as GGUF; mistral, llama"),
    ],
)
def test_what_gguf_has_no_words_for_is_refused_by_name(make, word, tmp_path):
    mine = opened(make(), tmp_path / "hf")
    with pytest.raises(UnsupportedModel, match=word):
        export_model(mine, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 70_000.0])
def test_a_weight_that_the_type_cannot_hold_leaves_nothing(value, tmp_path):
    mine = opened(llama(), tmp_path / "hf")
    with torch.no_grad():
        mine.model.layers[2].mlp.down_proj.weight[3, 4] = value
    with pytest.raises(FormatError, match=r"layers\.2\.mlp\.down_proj\.weight"):
        export_model(mine, tmp_path / "m.gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_an_adapter_a_type_and_a_place_that_is_taken_are_refused(tmp_path):
    mine = opened(llama(), tmp_path / "hf")
    with pytest.raises(UsageError, match="type 'Q4_0': expected one of F32, F16, Q8_0"):
        export_model(mine, tmp_path / "m.gguf", type="Q4_0")
    for taken in (tmp_path / "hf", tmp_path / "hf" / "config.json"):
        with pytest.raises(UsageError, match="is there already"):
            export_model(mine, taken)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is there already"):
        export_model(mine, tmp_path / "link")
    with pytest.raises(EnvironmentProblem, match="could not be written"):
        export_model(mine, tmp_path / "hf" / "config.json" / "m.gguf")
    lorax.add_adapter(mine, lorax.LoRAConfig(r=2))
    with pytest.raises(UsageError, match="carries an adapter"):
        export_model(mine, tmp_path / "m.gguf")


def test_the_names_and_the_order_of_rows_are_each_others_inverse():
    layout = LlamaConfig.gguf
    for theirs in (*(f"blk.7.{name}.weight" for name in LAYER_NAMES), "output_norm.weight"):
        assert gguf_name(hf_name(theirs, layout), layout) == theirs
    assert gguf_name("model.layers.0.self_attn.rotary.weight", layout) is None
    rows = torch.arange(48.0).view(24, 2)
    for heads in (1, 2, 3, 6):
        assert torch.equal(unpermute(permute(rows, heads), heads), rows)
    assert permute(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_fields_are_those_that_the_package_names(tmp_path):
    mine = opened(llama(rms_norm_eps=1e-5), tmp_path / "hf")
    mine.config = dataclasses.replace(mine.config, rope_theta=123456.0)
    export_model(mine, tmp_path / "m.gguf", type="Q8_0")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    keys, arch = gguf.Keys, "llama"
    assert fields[keys.General.ARCHITECTURE] == arch
    assert fields[keys.General.FILE_TYPE] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields[keys.General.QUANTIZATION_VERSION] == gguf.GGML_QUANT_VERSION
    assert fields[keys.LLM.CONTEXT_LENGTH.format(arch=arch)] == 256
    assert fields[keys.LLM.VOCAB_SIZE.format(arch=arch)] == 97
    assert fields[keys.Attention.HEAD_COUNT_KV.format(arch=arch)] == 2
    assert fields[keys.Attention.KEY_LENGTH.format(arch=arch)] == 8
    assert fields[keys.Attention.VALUE_LENGTH.format(arch=arch)] == 8
    assert fields[keys.Attention.LAYERNORM_RMS_EPS.format(arch=arch)] == np.float32(1e-5)
    assert fields[keys.Rope.DIMENSION_COUNT.format(arch=arch)] == 8
    assert fields[keys.Rope.FREQ_BASE.format(arch=arch)] == 123456.0
