"""The mismatch corpus: what other libraries load, drop or spoil without a word (R14).

Each case is an error or a warning by name, or a correct result. What another file tests already is
listed here, and a test holds that it is there:

    another base of the same shape      test_fingerprint::test_another_base_is_refused_unless_one_knows_better
    another shape or option             test_fingerprint::test_another_shape_or_option_is_named
    another quantization                test_fingerprint::test_another_quantization_is_a_warning
    one bit of one tensor               test_fingerprint::test_one_changed_bit_of_a_tensor_is_refused
    an edited alpha, rank, pattern      test_fingerprint::test_an_edited_config_is_refused_by_the_field
    tensors too many, too few, NaN      test_peft::test_tensors_that_do_not_fit_are_refused_by_name
    a config that asks for more         test_peft::test_configs_that_do_not_fit_are_refused_by_name
    a head that came with the file      test_peft::test_a_head_that_came_with_the_file_is_taken_against_peft
    rsLoRA ignored                      test_peft::test_an_adapter_of_peft_loads
    a misspelt target                   test_adapters::test_a_refused_config_leaves_the_model_as_it_was
    tied heads lost on merge            test_adapters::test_a_tied_head_is_untied_by_merging_and_the_config_says_so
                                        test_peft_extras::test_merged_it_opens_in_transformers_and_says_whether_it_is_tied
    base overwritten by merging         test_adapters::test_merge_in_float32_and_unmerge_bit_equal
    dropout left on when generating     test_adapters::test_dropout_sleeps_in_eval_mode_and_while_generating
    the gradient cut by checkpointing   test_adapters::test_gradients_reach_every_adapter_tensor
    a merge quantized again             test_adapters::test_merging_on_nf4_goes_into_dequantized_weights
    EOS never learned when pad = eos    test_examples::test_the_end_token_is_trained_even_where_it_is_the_pad_token
    double BOS                          test_examples::test_there_is_one_bos_token_and_it_is_not_trained
                                        test_examples::test_a_chat_template_that_writes_the_bos_token_gets_no_second_one
    a mask found by searching tokens    test_examples::test_the_mask_goes_by_position_where_the_answer_stands_in_the_prompt_too
    a mean of means                     test_training::test_micro_batches_change_no_result
    LoRA+ with ratio 1 not AdamW        test_optim_lora_plus::test_ratio_1_is_adamw_bit_for_bit
    packed NF4 held as bfloat16         test_bitsandbytes_checkpoints::test_every_storage_dtype
                                        test_quant_four_bit::test_linear_keeps_its_codes_when_the_module_changes_dtype
    int32 offsets                       test_quant_four_bit::test_r8_more_than_2_31_values
    packing that leaks across documents test_packed::test_no_document_sees_another
                                        test_packing::test_a_leak_at_the_seams_is_found
    the label at each seam              test_packed::test_the_label_at_a_seam_is_never_predicted_from_the_document_before
"""  # noqa: E501  # names in full, so that they can be searched for

import copy
import json
import math
import re

import pytest
import torch
from named_tests import is_there, named_in
from oracles import gpt2, llama, peft_model, tokens
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.errors import AdapterError, LoraxError
from lorax.quant.linear import QuantizedLinear

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("name", named_in(__doc__))
def test_the_cases_of_other_files_are_there(name):
    assert is_there(name)


def logits(model):
    with torch.no_grad():
        found = model(tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=["a stranger's", "ours"])
def adapter(request, base, tmp_path):
    """An adapter of rank 48, the model's width, so that A and B of q_proj have one shape.

    As PEFT saves it, without a fingerprint, and as lorax does.
    """
    theirs = peft_model(llama(), r=48, target_modules=["q_proj"], use_rslora=True)
    theirs.save_pretrained(tmp_path / "adapter")
    if request.param == "ours":
        model = lorax.load_model(base)
        lorax.load_adapter(model, tmp_path / "adapter")
        lorax.save_adapter(model, tmp_path / "ours")
        return tmp_path / "ours"
    return tmp_path / "adapter"


def is_ours(adapter):
    return adapter.name == "ours"


def rewrite(adapter, change):
    with safe_open(adapter / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(adapter / TENSORS)
    change(tensors)
    save_file(tensors, adapter / TENSORS, metadata=metadata)


def edit_config(adapter, **changes):
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**values, **changes}))


def refused(base, adapter, match, error=LoraxError):
    model = lorax.load_model(base)
    before = logits(model)
    with pytest.raises(error, match=match):
        lorax.load_adapter(model, adapter)
    assert not adapter_layers(model)
    assert torch.equal(logits(model), before)


# --- the adapter's files -------------------------------------------------------------------------


NO_NUMBERS = {
    "NaN": "adapter_config.json: not valid JSON",
    "Infinity": "adapter_config.json: not valid JSON",
    "-Infinity": "adapter_config.json: not valid JSON",
    "1e999": "adapter_config.json: lora_alpha is inf; expected a finite number",
}


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_an_alpha_that_is_no_number(value, base, adapter):
    text = (adapter / CONFIG).read_text()
    changed = re.sub(r'"lora_alpha": [\d.]+', f'"lora_alpha": {value}', text)
    assert changed != text
    (adapter / CONFIG).write_text(changed)
    refused(base, adapter, NO_NUMBERS[value])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_with_a_nan_or_an_infinity(value, base, adapter):
    rewrite(adapter, lambda tensors: tensors[f"{LAYER}.lora_A.weight"].view(-1)[5].fill_(value))
    refused(base, adapter, "not those that were saved" if is_ours(adapter) else "not finite")


def test_names_without_peft_s_prefix(base, adapter):
    """PEFT: loads, says nothing, and computes as the base."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    rewrite(adapter, strip)
    refused(base, adapter, "not those that were saved" if is_ours(adapter) else "missing")


def test_names_that_keep_the_adapter_s_name(base, adapter):
    """`lora_A.default.weight`, as a state dict saved by hand has it."""

    def keep(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    rewrite(adapter, keep)
    refused(base, adapter, "not those that were saved" if is_ours(adapter) else "unexpected")


def test_swapped_a_and_b(base, adapter):
    """Of one shape here: in a stranger's file nobody can see it, in ours the digest does."""

    def swap(tensors):
        a, b = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(adapter, swap)
    if is_ours(adapter):
        refused(base, adapter, "tensors are not those that were saved")
    else:
        lorax.load_adapter(lorax.load_model(base), adapter)


def test_swapped_a_and_b_of_different_shapes(base, tmp_path):
    peft_model(llama(), r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")

    def swap(tensors):
        a, b = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(tmp_path / "adapter", swap)
    refused(base, tmp_path / "adapter", r"layers\.1\.self_attn\.q_proj\.lora_[AB]", AdapterError)


def test_rslora_dropped(base, adapter):
    """48 / sqrt(48) or 48 / 48: seven times the effect. Only a fingerprint can tell."""
    edit_config(adapter, use_rslora=False)
    if is_ours(adapter):
        refused(base, adapter, "use_rslora is False, was True", AdapterError)
    else:
        lorax.load_adapter(lorax.load_model(base), adapter)


def test_a_transposed_gpt2_weight(tmp_path):
    """Conv1D's orientation in the file: another shape is refused, a square one has a digest."""
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    for who, settings, name in (
        ("rectangle", {"r": 4}, "c_attn.lora_A.weight"),
        ("square", {"modules_to_save": ["attn.c_proj"]}, "attn.c_proj.weight"),
    ):
        model = lorax.load_model(tmp_path / "base")
        lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["c_attn"], **settings))
        lorax.save_adapter(model, tmp_path / who)
        full = f"base_model.model.transformer.h.1.{'attn.' if 'lora' in name else ''}{name}"

        def turn(tensors, full=full):
            tensors[full] = tensors[full].t().contiguous()

        rewrite(tmp_path / who, turn)
        refused(tmp_path / "base", tmp_path / who, "not those that were saved", AdapterError)
    found = load_file(tmp_path / "rectangle" / TENSORS)
    save_file(found, tmp_path / "rectangle" / TENSORS, metadata={"format": "pt"})
    refused(tmp_path / "base", tmp_path / "rectangle", "c_attn.lora_A", AdapterError)


@pytest.mark.parametrize("said", [True, False])
def test_fan_in_fan_out_said_wrongly(said, tmp_path):
    """The flag follows from the model: PEFT corrects it and warns, lorax does not need it."""
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(base, target_modules=["c_attn"])
    theirs.save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", fan_in_fan_out=said)
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "adapter")
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-5


def test_an_adapter_of_a_larger_model(base, tmp_path):
    """PEFT drops the layers that the smaller model does not have."""
    larger = llama(num_hidden_layers=5)
    peft_model(larger, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path / "adapter", "4 unexpected", AdapterError)


def test_what_peft_does_with_the_worst_of_them(base, tmp_path):
    """The control: the installed PEFT loads these without an error, so the cases are real."""
    clean = peft_model(llama(), r=4, target_modules=["q_proj"])
    clean.save_pretrained(tmp_path / "adapter")

    def spoil(tensors):
        tensors[f"{LAYER}.lora_A.weight"][0, 0] = math.nan
        tensors[LAYER.replace("q_proj", "k_proj") + ".lora_A.weight"] = torch.zeros(4, 48)

    rewrite(tmp_path / "adapter", spoil)
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert logits(theirs).isnan().any()


# --- merging and training ------------------------------------------------------------------------


def test_dropout_left_on_when_merging(base):
    """A model in training mode, dropout at work: merged it gives the same twice, and the right."""
    model = lorax.load_model(base)
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["q_proj"], lora_dropout=0.5))
    for layer in adapter_layers(model).values():
        layer.lora_B.data.normal_()
    expected = logits(model)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    lorax.merge_adapter(model)
    assert torch.equal(logits(model), logits(model))
    assert (logits(model) - expected).norm() / expected.norm() <= 2e-6
    lorax.unmerge_adapter(model)
    lorax.unload_adapter(model, merge=True)
    assert model.lm_head.training
    assert (logits(model) - expected).norm() / expected.norm() <= 2e-6


def test_the_base_is_overwritten_by_nothing(base, tmp_path):
    """Merge, unmerge, save, take out: every byte of the base and of its file is the same."""
    file = base / "model.safetensors"
    before, model = file.read_bytes(), lorax.load_model(base)
    held = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {"bias": "all", "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    settings["trainable_token_indices"] = [4]
    lorax.add_adapter(model, lorax.LoRAConfig(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    lorax.merge_adapter(model)
    lorax.unmerge_adapter(model)
    lorax.save_adapter(model, tmp_path / "adapter")
    lorax.unload_adapter(model)
    after = model.state_dict()
    assert list(after) == list(held)
    assert all(torch.equal(after[name], held[name]) for name in held)
    assert file.read_bytes() == before


def test_embeddings_and_head_cast_to_float32_unseen(base):
    """What PEFT's prepare_model_for_kbit_training does; here the base keeps its dtype."""
    model = lorax.load_model(base, "bfloat16", quantization="nf4")
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules="all-linear"))
    model.train()
    kept = {name: p.dtype for name, p in model.named_parameters() if "lora_" not in name}
    assert set(kept.values()) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_packed_nf4_survives_a_copy_and_a_cast(base):
    """Codes stay uint8: a byte that would be a NaN in bfloat16 comes back as it was."""
    model = lorax.load_model(base, quantization="nf4")
    codes = {n: m.quantized for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    before = {name: q.to_bitsandbytes()["weight"].clone() for name, q in codes.items()}
    other = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    for name, packed in before.items():
        again = other.get_submodule(name).quantized.to_bitsandbytes()["weight"]
        assert again.dtype == torch.uint8
        assert torch.equal(again, packed)
