"""R14: an adapter fits its base. The digest's own properties, and what loading says."""

import json
import logging

import pytest
import torch
from oracles import gpt2, llama, tokens
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError, FormatError
from lorax.formats import fingerprint
from lorax.formats.open_model import open_model

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def base(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter over `base` in float32, as lorax saves it."""
    return save(lorax.load_model(base), tmp_path / "adapter")


def save(model, path, **config):
    settings = {"target_modules": ["q_proj"], "r": 4, "alpha_pattern": {"layers.1.*": 5}, **config}
    lorax.add_adapter(model, lorax.LoRAConfig(**settings))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.normal_()
    lorax.save_adapter(model, path)
    return path


def stated(adapter):
    with safe_open(adapter / TENSORS, "pt") as file:
        return json.loads(file.metadata()[fingerprint.KEY])


def rewrite(adapter, change):
    """Save the tensors again, changed, with the metadata that was there."""
    with safe_open(adapter / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(adapter / TENSORS)
    change(tensors, metadata)
    save_file(tensors, adapter / TENSORS, metadata=metadata)


def edit_config(adapter, **changes):
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**values, **changes}))


def refused(base, adapter, match, **options):
    model = lorax.load_model(base)
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with pytest.raises(AdapterError, match=match):
        lorax.load_adapter(model, adapter, **options)
    assert [(n, id(p)) for n, p in model.named_parameters()] == before


# --- the digest ----------------------------------------------------------------------------------


def test_one_base_is_one_however_it_is_loaded(base, adapter, tmp_path, caplog):
    for number, options in enumerate(
        [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "nf4"}]
    ):
        other = save(lorax.load_model(base, **options), tmp_path / str(number))
        assert stated(other)["base"] == stated(adapter)["base"]
    lorax.load_adapter(lorax.load_model(base, "bfloat16"), adapter)
    assert not caplog.records


def test_the_digest_is_that_of_its_definition(base):
    """Computed here from the file by hand: names, dtypes, shapes, bytes, sorted; no tied head."""
    import hashlib

    lines = []
    for name, tensor in load_file(base / "model.safetensors").items():
        data = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        lines.append(f"{name} float32 {list(tensor.shape)} {data}\n")
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert fingerprint.files_digest(base) == expected


def test_shards_names_and_a_tied_head_in_the_file_change_nothing(tmp_path):
    for make, prefix in ((llama, "model."), (gpt2, "transformer.")):
        model = make(tie_word_embeddings=True)
        model.save_pretrained(tmp_path / prefix / "one")
        model.save_pretrained(tmp_path / prefix / "many", max_shard_size="20KB")
        assert len(list((tmp_path / prefix / "many").glob("*.safetensors"))) > 2
        model.save_pretrained(tmp_path / prefix / "bare")
        file = tmp_path / prefix / "bare" / "model.safetensors"
        tensors = {name.removeprefix(prefix): t for name, t in load_file(file).items()}
        tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
        save_file(tensors, file, metadata={"format": "pt"})
        digests = {fingerprint.files_digest(tmp_path / prefix / w) for w in ("one", "many", "bare")}
        assert len(digests) == 1


def test_one_bit_of_one_tensor_is_another_digest_and_so_is_a_dtype(base):
    first = fingerprint.files_digest(base)
    tensors = load_file(base / "model.safetensors")
    one = {name: tensor.clone() for name, tensor in tensors.items()}
    one["model.norm.weight"].view(torch.int32)[7] ^= 1
    save_file(one, base / "model.safetensors", metadata={"format": "pt"})
    second = fingerprint.files_digest(base)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, fingerprint.files_digest(base)}) == 3


@pytest.mark.parametrize("part", ["weight", "weight.absmax", "weight.nested_absmax"])
def test_a_bitsandbytes_checkpoint_counts_with_its_scales(part, base, tmp_path):
    lorax.save_model(lorax.load_model(base, quantization="nf4-dq"), tmp_path / "nf4")
    before = fingerprint.files_digest(tmp_path / "nf4")
    file = tmp_path / "nf4" / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    tensors[f"model.layers.2.mlp.up_proj.{part}"].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint.files_digest(tmp_path / "nf4") != before


def test_files_are_read_once_and_again_when_they_change(base, monkeypatch):
    reads = []
    lines = fingerprint._lines
    monkeypatch.setattr(fingerprint, "_lines", lambda files: reads.append(1) or lines(files))
    assert fingerprint.files_digest(base) == fingerprint.files_digest(base)
    assert len(reads) == 1
    llama(tie_word_embeddings=True).save_pretrained(base)
    fingerprint.files_digest(base)
    assert len(reads) == 2


@pytest.mark.slow
def test_a_gguf_file_has_one(smollm2_gguf):
    digest = fingerprint.files_digest(smollm2_gguf)
    assert len(digest) == 64
    assert fingerprint.files_digest(smollm2_gguf) == digest


# --- what the file says --------------------------------------------------------------------------


def test_what_an_adapter_says_and_that_peft_reads_past_it(base, adapter, tmp_path):
    found = stated(adapter)
    assert found["lorax"] == lorax.__version__
    assert found["quantization"] is None
    assert found["base"]["sha256"] == fingerprint.files_digest(base)
    assert found["base"]["path"] == str(base)
    assert found["base"]["config"]["hidden_size"] == 48
    assert found["format"] == 2
    assert found["adapter"]["settings"] == {  # what is not the default
        "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"],
        "alpha_pattern": {"layers.1.*": 5},
    }  # fmt: skip
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    mine = lorax.load_model(base)
    lorax.load_adapter(mine, adapter)
    with torch.no_grad():
        assert (theirs(tokens()).logits - mine(tokens())).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "again")  # the metadata is gone: a stranger's adapter
    with safe_open(tmp_path / "again" / TENSORS, "pt") as file:
        assert fingerprint.KEY not in file.metadata()
    lorax.load_adapter(lorax.load_model(base), tmp_path / "again")


def test_quantization_is_said_by_name(base, tmp_path):
    for format in ("nf4", "fp4-dq", "int8"):
        model = lorax.load_model(base, quantization=format)
        assert stated(save(model, tmp_path / format))["quantization"] == format


def test_a_model_without_files_says_so_and_keeps_the_adapter_s_own_digest(base, tmp_path, caplog):
    model = lorax.load_model(base)
    model.loaded_from = None
    path = save(model, tmp_path / "a")
    assert "no fingerprint of its base" in caplog.text
    found = stated(path)
    assert found["base"]["sha256"] is None
    assert len(found["adapter"]["sha256"]) == 64
    lorax.load_adapter(lorax.load_model(base), path)
    edit_config(path, lora_alpha=9)
    refused(base, path, "lora_alpha is 9, was 8")


def test_a_merged_model_is_not_its_files_any_more(base, adapter, tmp_path, caplog):
    model = lorax.load_model(base)
    lorax.load_adapter(model, adapter)
    lorax.unload_adapter(model, merge=True)
    assert stated(save(model, tmp_path / "second"))["base"]["sha256"] is None


# --- what loading says ---------------------------------------------------------------------------


def test_a_base_whose_files_are_gone_cannot_be_checked_and_says_so(base, adapter, caplog):
    model = lorax.load_model(base)
    (base / "model.safetensors").unlink()
    lorax.load_adapter(model, adapter)
    assert "cannot be checked" in caplog.text


def test_another_base_is_refused_unless_one_knows_better(base, adapter, tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", adapter, "trained over .*base, whose tensors .* same shapes")
    lorax.load_adapter(lorax.load_model(tmp_path / "other"), adapter, check_base=False)


def test_another_shape_or_option_is_named(base, adapter, tmp_path):
    llama(tie_word_embeddings=True, num_hidden_layers=2).save_pretrained(tmp_path / "shorter")
    refused(tmp_path / "shorter", adapter, "num_hidden_layers 2 here, 3 there")
    found = json.loads((base / "config.json").read_text())
    found["rms_norm_eps"] = 1e-2
    (base / "config.json").write_text(json.dumps(found))
    refused(base, adapter, r"rms_norm_eps 0\.01 here, 1e-06 there")


def test_another_quantization_is_a_warning(base, adapter, caplog):
    with caplog.at_level(logging.WARNING):
        lorax.load_adapter(lorax.load_model(base, quantization="nf4-dq"), adapter)
    (record,) = caplog.records
    assert "not quantized, loaded over one quantized as nf4-dq" in record.getMessage()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora_alpha": 16}, "lora_alpha is 16, was 8"),
        ({"use_rslora": True}, "use_rslora is True, was False"),
        ({"alpha_pattern": {}}, "alpha_pattern"),
        ({"alpha_pattern": {"layers.1.*": 6}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 5}, "r is 5, was 4"),
        ({"lora_dropout": 0.1}, r"lora_dropout is 0\.1, was 0"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', was True"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\], was None"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora is True, was False"),
        ({"bias": "all"}, "bias is 'all', was 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_an_edited_config_is_refused_by_the_field(changes, word, base, adapter):
    edit_config(adapter, **changes)
    refused(base, adapter, word)
    if "alpha" in word or "rank" in word or "rslora" in word:  # the tensors still fit
        lorax.load_adapter(lorax.load_model(base), adapter, check_adapter=False)


START = {"pissa": "olora", "olora": "pissa", "loftq": True}


@pytest.mark.parametrize("how", START)
def test_another_start_of_an_adapter_inside_the_weight_is_refused(how, base, tmp_path):
    model = lorax.load_model(base)
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["q_proj"], init_lora_weights=how))
    lorax.save_adapter(model, tmp_path / "adapter")
    lorax.load_adapter(lorax.load_model(base), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", init_lora_weights=START[how])
    refused(base, tmp_path / "adapter", f"init_lora_weights is {START[how]!r}, was {how!r}")


def test_loftq_s_rounds_and_the_rows_are_settings_too(base, tmp_path):
    model = lorax.load_model(base)
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["q_proj"], **loftq))
    lorax.save_adapter(model, tmp_path / "loftq")
    edit_config(tmp_path / "loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    refused(base, tmp_path / "loftq", "loftq_config is .*1.*, was .*2")
    model, rows = lorax.load_model(base), tmp_path / "rows"
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    lorax.add_adapter(model, lorax.LoRAConfig(**settings))
    lorax.save_adapter(model, rows)
    edit_config(rows, trainable_token_indices=[5, 3])
    refused(base, rows, r"trainable_token_indices is \[5, 3\], was \[3, 5\]")


def test_a_prompt_s_settings_count_too(base, tmp_path):
    model = lorax.load_model(base)
    lorax.add_adapter(model, lorax.PromptTuningConfig(4))
    lorax.save_adapter(model, tmp_path / "prompt")
    lorax.load_adapter(lorax.load_model(base), tmp_path / "prompt")
    edit_config(tmp_path / "prompt", prompt_tuning_init="SAMPLE_VOCAB")
    refused(base, tmp_path / "prompt", "prompt_tuning_init is 'SAMPLE_VOCAB', was 'RANDOM'")


def test_what_only_describes_may_be_edited(base, adapter):
    edit_config(adapter, task_type="FEATURE_EXTRACTION", base_model_name_or_path="elsewhere",
                revision="main", inference_mode=False)  # fmt: skip
    lorax.load_adapter(lorax.load_model(base), adapter)


def test_a_default_that_is_written_out_or_left_out_is_the_same(base, adapter):
    """A key that one version writes and another does not know is the default on both sides."""
    edit_config(adapter, use_dora=False, loftq_config={}, exclude_modules=None)
    values = json.loads((adapter / CONFIG).read_text())
    del values["bias"], values["lora_dropout"]
    (adapter / CONFIG).write_text(json.dumps(values))
    lorax.load_adapter(lorax.load_model(base), adapter)


def in_format_1(adapter, **changes):
    """Write the fingerprint as lorax's first format had it: five settings, alphas as floats."""
    values = json.loads((adapter / CONFIG).read_text())
    settings = {
        "r": values["r"],
        "lora_alpha": float(values["lora_alpha"]),
        "use_rslora": values.get("use_rslora", False),
        "rank_pattern": values.get("rank_pattern", {}),
        "alpha_pattern": {k: float(v) for k, v in values.get("alpha_pattern", {}).items()},
    }

    def change(tensors, metadata):
        found = json.loads(metadata[fingerprint.KEY])
        digest = fingerprint.adapter_digest(tensors, settings)
        found |= {"format": 1, "adapter": {**found["adapter"], "settings": settings}}
        found["adapter"]["sha256"] = digest
        metadata[fingerprint.KEY] = json.dumps(found)

    rewrite(adapter, change)
    edit_config(adapter, **changes)


def test_the_first_format_is_read_and_checked_as_it_was(base, adapter):
    in_format_1(adapter)
    lorax.load_adapter(lorax.load_model(base), adapter)
    edit_config(adapter, lora_alpha=9)
    refused(base, adapter, r"lora_alpha is 9\.0, was 8\.0")


def test_the_first_format_says_nothing_of_other_settings(base, adapter):
    in_format_1(adapter, lora_dropout=0.1)
    lorax.load_adapter(lorax.load_model(base), adapter)

    def change(tensors, _):
        next(iter(tensors.values())).view(torch.int32).view(-1)[3] ^= 1

    rewrite(adapter, change)
    refused(base, adapter, "tensors are not those that were saved")


def test_one_changed_bit_of_a_tensor_is_refused(base, adapter):
    def change(tensors, _):
        next(iter(tensors.values())).view(torch.int32).view(-1)[3] ^= 1

    rewrite(adapter, change)
    refused(base, adapter, "tensors are not those that were saved")
    lorax.load_adapter(lorax.load_model(base), adapter, check_adapter=False)


def test_alpha_as_a_whole_number_or_not_is_the_same(base, adapter):
    edit_config(adapter, lora_alpha=8.0, alpha_pattern={"layers.1.*": 5.0})
    lorax.load_adapter(lorax.load_model(base), adapter)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"base": 1, "adapter": 2}', '{"base": {}}', '{"base": {"config": []}}'],
)
def test_a_damaged_fingerprint_is_a_format_error(text, base, adapter):
    rewrite(adapter, lambda _, metadata: metadata.update({fingerprint.KEY: text}))
    with pytest.raises(FormatError, match=r"lorax\.fingerprint"):
        lorax.load_adapter(lorax.load_model(base), adapter)


def test_a_later_form_is_not_checked_and_says_so(base, adapter, caplog):
    rewrite(adapter, lambda _, metadata: metadata.update({fingerprint.KEY: '{"format": 3}'}))
    lorax.load_adapter(lorax.load_model(base), adapter)
    assert "not checked" in caplog.text


def test_open_model_passes_the_word_on(base, adapter, tmp_path):
    from tiny_tokenizer import byte_tokenizer

    from lorax.formats.tokenizer_files import write_tokenizer

    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    write_tokenizer(byte_tokenizer(), tmp_path / "other")
    with pytest.raises(AdapterError, match="check_base=False"):
        open_model(str(adapter), str(tmp_path / "other"))
    open_model(str(adapter), str(tmp_path / "other"), check_base=False)
