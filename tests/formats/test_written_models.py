"""What a copy of a model keeps of its base's files: merged, quantized, saved, trained in full."""

import json
import os
from pathlib import Path

import pytest
import torch
from oracles import gpt2, llama, mistral, tokens
from test_config_dialects import GONE, both, difference, edit
from tiny_tokenizer import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import lorax
from lorax.errors import EnvironmentProblem, FormatError, UsageError
from lorax.formats.directory import written_directory
from lorax.formats.quantize_model import quantize_model
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.merging.files import write_merged

MAKE = {"llama": llama, "mistral": mistral, "gpt2": gpt2}
GENERATION = '{"eos_token_id": [3, 5], "temperature": 0.6,   "do_sample": true}'
PAPERS = {"README.md": "# A card", "LICENSE.txt": "ours", "NOTICE": "n", "USE_POLICY.md": "be kind"}


def base(folder: Path, family: str, **changes) -> Path:
    MAKE[family]().save_pretrained(folder)
    write_tokenizer(byte_tokenizer(), folder)
    said = {"bos_token_id": 11, "eos_token_id": [3, 5], "pad_token_id": 14, "my_key": {"a": [1]}}
    edit(folder, **said, _name_or_path="/home/me", auto_map={"AutoConfig": "x.Y"}, **changes)
    (folder / "generation_config.json").write_text(GENERATION)
    for name, text in PAPERS.items():
        (folder / name).write_text(text)
    return folder


def adapted(path: Path, **options):
    model = lorax.load_model(path, **options)
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def saved(path, out):
    lorax.save_model(lorax.load_model(path), out)


def merged(path, out):
    model = adapted(path)
    lorax.unload_adapter(model, merge=True)
    write_merged(model, out)


def quantized(path, out):
    quantize_model(path, out, "nf4")


WAYS = [saved, merged, quantized]


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_says_what_its_base_says(way, family, tmp_path):
    path = base(tmp_path / "base", family)
    before = json.loads((path / "config.json").read_text())
    way(path, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after.pop("quantization_config", None) is not None) == (way is quantized)
    assert after == {k: v for k, v in before.items() if k not in ("_name_or_path", "auto_map")}
    for name, text in {**PAPERS, "generation_config.json": GENERATION}.items():
        assert (tmp_path / "out" / name).read_text() == text
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    assert (theirs.model_type, theirs.my_key) == (family, {"a": [1]})
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [3, 5]


LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
DIALECTS = {
    "llama, old rope": ("llama", {
        "rope_parameters": GONE, "rope_theta": 5e5, "rope_scaling": LINEAR,
        "torch_dtype": "float32", "dtype": GONE,
    }),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral, a window": ("mistral", {"sliding_window": 9}),
    "mistral, none said": ("mistral", {"sliding_window": GONE}),
    "gpt2, aliases": ("gpt2", {
        "n_layer": GONE, "num_hidden_layers": 3, "n_inner": None, "activation_function": "relu",
    }),
    "gpt2, by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "architectures": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", DIALECTS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_saved_model_is_the_same_in_transformers(case, dtype, tmp_path):
    family, changes = DIALECTS[case]
    path = base(tmp_path / "base", family, **changes)
    mine = lorax.load_model(path, dtype)
    lorax.save_model(mine, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert again.dtype == mine.lm_head.weight.dtype
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=again.dtype).eval()
    ids = tokens(length=60)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "out"))
    changed = {k for k in {*before, *after} if before.get(k) != after.get(k)}
    allowed = {"_name_or_path", "auto_map", "architectures"} | (
        {"dtype", "torch_dtype"} if dtype == "bfloat16" else set()
    )
    assert changed <= allowed


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_merge_says_what_it_changed_and_no_more(family, tmp_path):
    """Biases gained: Mistral's class has no word for them, Llama's computes the same."""
    path = tmp_path / "base"
    MAKE[family](tie_word_embeddings=True).save_pretrained(path)
    model = lorax.load_model(path)
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids)
    lorax.unload_adapter(model, merge=True)
    lorax.save_model(model, tmp_path / "out")
    mine, theirs = both(tmp_path / "out")
    assert theirs.config.attention_bias
    assert theirs.config.model_type == "llama"
    assert theirs.config.tie_word_embeddings
    with torch.no_grad():
        assert (theirs(ids).logits - expected).abs().max() <= 2e-5
    assert difference(mine, theirs, ids) <= 1e-5


def test_a_mistral_with_a_window_and_biases_has_no_config(tmp_path):
    mistral(sliding_window=9).save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    lorax.unload_adapter(model, merge=True)
    with pytest.raises(UsageError, match="sliding_window of 9"):
        lorax.save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_brings_its_own_end_tokens(tmp_path):
    path = base(tmp_path / "base", "llama")
    tokenizer = byte_tokenizer()
    lorax.save_model(lorax.load_model(path), tmp_path / "out", tokenizer=tokenizer)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {**json.loads(GENERATION), "eos_token_id": list(tokenizer.end_token_ids)}


def test_a_quantized_model_saved_densely_says_so(tmp_path):
    quantized(base(tmp_path / "base", "llama"), tmp_path / "nf4")
    model = adapted(tmp_path / "nf4")
    lorax.unload_adapter(model, merge=True)
    write_merged(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["my_key"] == {"a": [1]}
    assert difference(*both(tmp_path / "out"), tokens()) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_out_may_be_a_link_to_a_directory(way, tmp_path):
    path = base(tmp_path / "base", "llama")
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    way(path, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    lorax.load_model(tmp_path / "disk")
    assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(UsageError, match="not empty"):
        way(path, tmp_path / "out")


def test_a_mount_is_written_inside(tmp_path, monkeypatch):
    """A mount, as far as a test can have one: no rename leads over it or into it from outside."""
    target = tmp_path / "volume"
    target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == target)
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def guarded(source, to, real=real):
            assert Path(to) != target
            assert Path(source).is_relative_to(target) == Path(to).is_relative_to(target)
            return real(source, to)

        monkeypatch.setattr(os, name, guarded)
    for replace, text in ((False, "1"), (True, "2")):
        with written_directory(target, replace=replace) as directory:
            (directory / "config.json").write_text(text)
            (directory / "below").mkdir() if not replace else None
        assert (target / "config.json").read_text() == text
    assert sorted(p.name for p in target.iterdir()) == ["below", "config.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["volume"]


def write_three(target):
    with written_directory(target) as directory:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (directory / name).write_text("x")


def test_a_failure_inside_a_linked_directory_leaves_it_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    order, real = [], os.replace

    def failing(source, to):
        order.append(Path(to).name)
        if Path(to).name == "config.json":
            raise OSError(5, "Input/output error")
        return real(source, to)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(EnvironmentProblem):
        write_three(tmp_path / "out")
    assert order == ["model.safetensors", "tokenizer.json", "config.json"]
    assert not list((tmp_path / "disk").iterdir())


def test_a_tilde_is_ones_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    base(tmp_path / "base", "llama")
    model = lorax.load_model("~/base")
    assert model.name_or_path == str(tmp_path / "base")
    lorax.save_model(model, "~/saved")
    quantize_model("~/base", "~/small", "nf4")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "saved", "small"}


def test_pickles_are_refused_with_the_lines_that_convert_them(tmp_path, monkeypatch):
    theirs = llama()
    path = base(tmp_path / "base", "llama")
    torch.save(theirs.state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is a pickle") as caught:
        lorax.load_model(path)
    _, _, lines = str(caught.value).partition("convert it: ")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})  # noqa: S102  # what the message tells a user to run
    assert difference(lorax.load_model(tmp_path / "converted"), theirs, tokens()) <= 1e-5
