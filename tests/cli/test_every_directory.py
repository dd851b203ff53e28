"""Every covered kind of directory goes through the commands; its logits are the oracles'.

The kinds are `hf_directories.TABLE` x `DIALECTS`. Each is trained for two steps, then what came of
it is held against the oracle in float32: the base, the adapter and the merged model.
"""

import json
import math
from pathlib import Path

import hf_directories
import peft
import pytest
import torch
import transformers
from command_line import run_lorax
from hf_directories import CELLS

import lorax
from lorax.inference.generate import stream

BOUND = 1e-5
SENTENCE = "The boat is a vessel"
ROWS = [
    {"instruction": "What is a boat?", "input": "", "output": "It is a vessel."},
    {"instruction": "What is it?", "input": "the sea", "output": "The sea is wide."},
]
RECIPE = """[model]
path = "{base}"
dtype = "{dtype}"
[adapter]
r = 4
target_modules = "all-linear"
[data]
path = "{rows}"
max_length = 256
[train]
output_dir = "{run}"
max_steps = 2
batch_size = 2
micro_batch_size = 1
learning_rate = 0.05
"""
# One of each architecture is quick, each with another tokenizer and another dialect.
QUICK = ("llama-LlamaTokenizer-transformers5", "mistral-bytes-minimal", "gpt2-GPT2Tokenizer-old")


def marked(cell):
    marks = () if str(cell) in QUICK else pytest.mark.slow
    return pytest.param(cell, id=str(cell), marks=marks)


@pytest.fixture(scope="module", params=[marked(cell) for cell in CELLS])
def place(request, tmp_path_factory) -> Path:
    """The cell's directory, rows and a recipe, trained; the commands' outputs."""
    root = tmp_path_factory.mktemp("cell")
    hf_directories.build(request.param, root / "base")
    (root / "rows.json").write_text(json.dumps(ROWS))
    (root / "text.jsonl").write_text(json.dumps({"text": SENTENCE}))
    names = {"base": root / "base", "rows": root / "rows.json", "run": root / "run"}
    half = hf_directories.DIALECTS[request.param.dialect] == torch.float16  # not to be trained in
    recipe = RECIPE.format(dtype="float32" if half else "auto", **names)
    (root / "recipe.toml").write_text(recipe)
    run_lorax("train", root / "recipe.toml")
    return root


def hugging_face(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, hf_directories.VOCAB, (2, 24), generator=generator)
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def far(ours, theirs):
    return float((logits(ours) - logits(theirs)).abs().max())


def test_the_base_and_its_tokens_against_transformers(place):
    theirs = hugging_face(place / "base")
    assert far(lorax.load_model(place / "base", dtype="float32"), theirs) < BOUND
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    ours = lorax.load_tokenizer(place / "base")
    for text in (SENTENCE, " two  spaces\n", "é 🚤", f"{tokenizer.eos_token}a"):
        assert ours.encode(text) == tokenizer(text).input_ids
        assert ours.decode(ours.encode(text)) == tokenizer.decode(tokenizer(text).input_ids)
    for token in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, token) == getattr(tokenizer, token)


def test_generate_against_transformers(place):
    """By token: random models say bytes that are no text, and a stream shows them otherwise."""
    theirs = transformers.AutoTokenizer.from_pretrained(place / "base")
    ours = lorax.load_tokenizer(place / "base")
    text = SENTENCE
    if theirs.chat_template is not None:
        messages = [{"role": "user", "content": SENTENCE}]
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours.apply_chat_template(messages, add_generation_prompt=True) == text
    ids = theirs(text, add_special_tokens=False).input_ids
    model = hugging_face(place / "base")
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0]
    model = lorax.load_model(place / "base", dtype="float32")
    found = list(stream(model, ours, ours.encode(text, add_special_tokens=False), 8))
    assert found == expected[len(ids) :][: len(found)].tolist()
    assert len(found) == 8 or expected[len(ids) + len(found)] in ours.end_token_ids
    run_lorax("generate", place / "base", SENTENCE, "--max-new-tokens", 2)


def test_evaluate_against_transformers(place):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    ids = torch.tensor([[*tokenizer(SENTENCE).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = hugging_face(place / "base")(ids, labels=ids).loss
    options = ("--data", place / "text.jsonl", "--dtype", "float32", "--json")
    found = json.loads(run_lorax("evaluate", place / "base", *options))
    assert found["tokens"] == ids.shape[1] - 1
    assert math.isclose(found["eval_loss"], expected, abs_tol=BOUND)


def test_the_trained_adapter_against_peft(place):
    base = hugging_face(place / "base")
    before = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, place / "run/adapter").eval()
    ours = lorax.load_model(place / "base", dtype="float32")
    lorax.load_adapter(ours, place / "run/adapter")
    assert (logits(theirs) - before).abs().max() > 1e-2  # two steps that can be seen
    assert far(ours, theirs) < BOUND
    run_lorax("verify", place / "run", "--tokens", 16)


def test_merged_against_peft_and_transformers(place):
    run_lorax("merge", place / "run", place / "merged", "--route", "float32")
    merged = hugging_face(place / "merged")
    assert far(lorax.load_model(place / "merged"), merged) < BOUND
    base = hugging_face(place / "base")
    theirs = peft.PeftModel.from_pretrained(base, place / "run/adapter")
    assert far(merged, theirs.merge_and_unload()) < BOUND
    ids = transformers.AutoTokenizer.from_pretrained(place / "merged")(SENTENCE).input_ids
    assert ids == transformers.AutoTokenizer.from_pretrained(place / "base")(SENTENCE).input_ids


def test_quantized_against_loading_in_nf4(place):
    run_lorax("quantize", place / "base", place / "nf4", "--format", "nf4-dq")
    stored = logits(lorax.load_model(place / "nf4"))
    assert torch.equal(stored, logits(lorax.load_model(place / "base", quantization="nf4-dq")))
    run_lorax("generate", place / "nf4", SENTENCE, "--max-new-tokens", 2)
