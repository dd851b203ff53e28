"""lorax export: a model, an adapter and a run, and every mistake in one line."""

import json

import pytest
import torch
from command_line import complete_lorax, run_lorax
from oracles import llama, peft_model
from tiny_tokenizer import CHATML, byte_backend, byte_tokenizer
from tokenizers import pre_tokenizers

import lorax
from lorax.data.tokenizer import Tokenizer
from lorax.formats.tokenizer_files import write_tokenizer

HI = "hi the 12 is"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base: a tiny Llama in bfloat16; adapter, dora, prompt: over it; odd: another tokenizer."""
    place = tmp_path_factory.mktemp("export")
    backend = byte_backend(merges=(("t", "h"), ("i", "s")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's
    tokenizer = Tokenizer(backend, eos_token="</s>", chat_template=CHATML)
    source = llama(vocab_size=tokenizer.vocab_size).bfloat16()
    for name, written in (("base", tokenizer), ("odd", byte_tokenizer(merges=(("t", "h"),)))):
        source.save_pretrained(place / name)
        write_tokenizer(written, place / name)
    for name, settings in {"adapter": {"use_rslora": True}, "dora": {"use_dora": True}}.items():
        peft = peft_model(source, r=4, target_modules="all-linear", **settings)
        peft.peft_config["default"].base_model_name_or_path = str(place / "base")
        peft.save_pretrained(place / name)
    model = lorax.load_model(place / "base")
    lorax.add_adapter(model, lorax.PromptTuningConfig(num_virtual_tokens=2))
    lorax.save_adapter(model, place / "prompt")
    return place


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).float()


def test_an_adapter_is_merged_in_float32_and_written_with_its_tokenizer(place, tmp_path):
    said = run_lorax("export", place / "adapter", tmp_path / "m.gguf", "--format", "gguf",
                     "--type", "F32", "--json")  # fmt: skip
    about = json.loads(said)
    assert (about["format"], about["type"]) == ("gguf", "F32")
    assert about["nbytes"] == (tmp_path / "m.gguf").stat().st_size
    model = lorax.load_model(place / "base").float()
    lorax.load_adapter(model, place / "adapter")
    lorax.merge_adapter(model)
    tokenizer = lorax.load_tokenizer(tmp_path / "m.gguf")
    ids = lorax.load_tokenizer(place / "base").encode(HI)
    assert tokenizer.encode(HI) == ids
    assert tokenizer.chat_template == CHATML
    assert torch.equal(logits(lorax.load_model(tmp_path / "m.gguf"), ids), logits(model, ids))


def test_f16_is_the_default_and_qlora_is_merged_over_the_decoded_base(place, tmp_path):
    run_lorax("export", place / "adapter", tmp_path / "m.gguf", "--format", "gguf",
              "--quantization", "nf4-dq")  # fmt: skip
    found = lorax.load_model(tmp_path / "m.gguf")
    assert found.lm_head.weight.dtype == torch.float16
    model = lorax.load_model(place / "base", quantization="nf4-dq")
    lorax.load_adapter(model, place / "adapter")
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        layer = model.model.layers[1].get_submodule(name)
        exact = layer.base_layer.dense(torch.float32).weight + layer.delta()
        assert torch.equal(found.model.layers[1].get_submodule(name).weight, exact.half()), name


def test_a_model_and_an_adapter_by_itself(place, tmp_path):
    said = run_lorax("export", place / "base", tmp_path / "b.gguf", "--format", "gguf",
                     "--type", "Q8_0")  # fmt: skip
    assert said.startswith(f"wrote {tmp_path / 'b.gguf'}: gguf, Q8_0, 30 tensors, ")
    said = run_lorax("export", place / "adapter", tmp_path / "a.gguf", "--format", "gguf-adapter")
    assert said.startswith(f"wrote {tmp_path / 'a.gguf'}: gguf-adapter, F32, 42 tensors, ")
    assert {p.name for p in tmp_path.iterdir()} == {"a.gguf", "b.gguf"}


MISTAKES = {
    "no such format": (["adapter", "OUT", "--format", "onnx"], 2, "format 'onnx': expected one of"),
    "no such type": (["adapter", "OUT", "--format", "gguf", "--type", "Q4_K"], 2, "type 'Q4_K'"),
    "a type of models": (
        ["adapter", "OUT", "--format", "gguf-adapter", "--type", "Q8_0"],
        2,
        "expected one of F32, F16",
    ),
    "a place that is taken": (["adapter", "base", "--format", "gguf"], 2, "is there already"),
    "nothing there": (["gone", "OUT", "--format", "gguf"], 3, "gone"),
    "no adapter there": (
        ["base", "OUT", "--format", "gguf-adapter"],
        2,
        "no adapter there, of which a gguf-adapter is made; a model lies there",
    ),
    "dora": (["dora", "OUT", "--format", "gguf-adapter"], 4, "lora_magnitude_vector (DoRA)"),
    "a prompt": (["prompt", "OUT", "--format", "gguf"], 4, "prompt"),
    "a prompt alone": (["prompt", "OUT", "--format", "gguf-adapter"], 4, "no Prompt tuning"),
    "another tokenizer": (["odd", "OUT", "--format", "gguf"], 4, "how the tokenizer cuts a text"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case, place, tmp_path):
    arguments, code, word = MISTAKES[case]
    names = ("adapter", "base", "gone", "dora", "prompt", "odd")
    paths = {"OUT": tmp_path / "out.gguf"} | {name: place / name for name in names}
    done = complete_lorax("export", *(paths.get(a, a) for a in arguments))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    assert word in lines[0]
    assert not list(tmp_path.iterdir())
