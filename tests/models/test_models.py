"""The models against transformers', loaded from files that transformers wrote."""

import json

import pytest
import torch
import transformers
from oracles import GPT2_KINDS, LLAMA_KINDS, gpt2, llama, mistral, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorax
from lorax.errors import FormatError, UnsupportedModel, UsageError

pytestmark = pytest.mark.slow

# float32 on tiny models: a few hundred roundings of values around 1.
TINY = 1e-5


def largest_difference(mine, theirs, ids):
    with torch.no_grad():
        return (mine(ids) - theirs(ids).logits).abs().max().item()


def reference(kind):
    family, _, name = kind.partition(": ")
    if family == "mistral":
        return mistral()
    kinds, make = (LLAMA_KINDS, llama) if family == "llama" else (GPT2_KINDS, gpt2)
    return make(**kinds[name])


ALL_KINDS = [f"llama: {k}" for k in LLAMA_KINDS] + [f"gpt2: {k}" for k in GPT2_KINDS] + ["mistral"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_logits_against_transformers(kind, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    assert largest_difference(mine, theirs, tokens(length=100)) <= TINY


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_saved_model_opens_in_transformers(kind, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    lorax.save_model(lorax.load_model(tmp_path / "theirs"), tmp_path / "mine")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mine", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.fixture(scope="module")
def smollm2_in_transformers(smollm2_gguf):
    folder, file = smollm2_gguf.rsplit("/", 1)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)


def test_smollm2_against_transformers(smollm2, smollm2_in_transformers):
    assert largest_difference(smollm2, smollm2_in_transformers, tokens(2, 128, 49152)) <= 1e-4


def test_smollm2_tokenizer_against_transformers(smollm2_tokenizer, smollm2_gguf):
    folder, file = smollm2_gguf.rsplit("/", 1)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    texts = [
        "",
        " ",
        "Hello  world, it's 2024!\n\n\tTabs and   spaces ",
        "naïve café — 東京 🦥 \u200b",
        "def f(x):\n    return x**2 + 10_000",
        "<|im_start|>user\nhi<|im_end|>",
        (transformers.__doc__ or "")[:500],
    ]
    for text in texts:
        assert smollm2_tokenizer.encode(text) == theirs(text).input_ids
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=False) == expected


@pytest.mark.parametrize("kind", ["llama: llama3 rope", "gpt2: plain"])
def test_cache_gives_what_the_whole_gives(kind, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    ids = tokens(rows=3, length=20)
    cache = model.new_cache(batch=3, max_length=20)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 13), (13, 20))]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= TINY


@pytest.mark.parametrize("kind", ["llama: tied", "gpt2: plain"])
def test_shards_are_read_and_written(kind, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40kB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    model = lorax.load_model(tmp_path / "theirs")
    lorax.save_model(model, tmp_path / "mine", max_shard_bytes=40_000)
    assert len(list((tmp_path / "mine").glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


def test_gpt2_names_without_prefix_and_mask_buffers(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    save_file(tensors, path, metadata={"format": "pt"})
    assert largest_difference(lorax.load_model(tmp_path), theirs, tokens()) <= TINY


def test_rope_in_the_dialect_of_transformers_4(tmp_path):
    theirs = llama(**LLAMA_KINDS["llama3 rope"])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    assert largest_difference(lorax.load_model(tmp_path), theirs, tokens(length=100)) <= TINY


@pytest.mark.parametrize(
    ("change", "word"), [({"quantization_config": {"quant_method": "gptq"}}, "gptq")]
)
def test_what_is_not_covered_is_refused_by_name(change, word, tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnsupportedModel, match=word):
        lorax.load_model(tmp_path)


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_are_named(what, tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        name = "model.layers.1.mlp.extra.weight"
        tensors[name] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        lorax.load_model(tmp_path)


def test_dtype_is_what_was_asked_or_what_the_config_says(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert lorax.load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert lorax.load_model(tmp_path, "float32").lm_head.weight.dtype == torch.float32
    assert lorax.load_model(tmp_path, torch.float16).lm_head.weight.dtype == torch.float16
    with pytest.raises(UsageError, match="float23"):
        lorax.load_model(tmp_path, "float23")


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path):
    """Three ways: our error against float32 is at most transformers' own, and a tenth."""
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    ids = tokens(length=64)
    half = lorax.load_model(tmp_path, "bfloat16")
    with torch.no_grad():
        truth = theirs(ids).logits
        ours = (half(ids).float() - truth).norm()
        other = (theirs.to(torch.bfloat16)(ids).logits.float() - truth).norm()
    assert ours <= 1.1 * other


def test_models_come_frozen_and_in_eval_mode(tmp_path):
    llama().save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_generation_against_transformers(smollm2, smollm2_tokenizer, smollm2_in_transformers):
    prompt = smollm2_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three colours."}], add_generation_prompt=True
    )
    ids = torch.tensor([smollm2_tokenizer.encode(prompt)])
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    made = smollm2_in_transformers.generate(ids, **how)
    expected = smollm2_tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert lorax.generate(smollm2, smollm2_tokenizer, prompt, max_new_tokens=24) == expected


def test_drawing_is_repeatable_and_top_p_of_almost_nothing_is_greedy(smollm2, smollm2_tokenizer):
    def make(**options):
        return lorax.generate(smollm2, smollm2_tokenizer, "The sea", max_new_tokens=8, **options)

    assert make(temperature=1.0, seed=3) == make(temperature=1.0, seed=3)
    assert make(temperature=1.0, top_p=1e-9, seed=3) == make()
    with pytest.raises(UsageError, match="temperature"):
        make(temperature=-1.0)


def test_a_prompt_longer_than_the_positions_is_refused(tmp_path, smollm2_tokenizer):
    gpt2(vocab_size=49152).save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    with pytest.raises(UsageError, match="255"):
        lorax.generate(model, smollm2_tokenizer, "word " * 400)
