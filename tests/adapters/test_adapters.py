"""LoRA by itself: injection, switching off, merging, and the property that ties merging to them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from oracles import gpt2, llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.adapters.counting import count_parameters
from lorax.adapters.lora import LoRALinear
from lorax.adapters.merge import merged_layer
from lorax.errors import AdapterError, UsageError
from lorax.formats.model_config import new_model, read_config
from lorax.quant.linear import QuantizedLinear
from lorax.training.loss import summed_loss


@pytest.fixture
def model(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    return lorax.load_model(tmp_path)


def filled(model, **config):
    """Add an adapter and give it random A and B."""
    lorax.add_adapter(model, lorax.LoRAConfig(**{"target_modules": "all-linear", **config}))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_A.normal_(std=0.1)
            layer.lora_B.normal_(std=0.1)
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids)


def relative_rms(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


# --- the property: a merged layer is the layer -------------------------------------------------


@given(
    sizes=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    r=st.integers(1, 20),
    alpha=st.floats(-64, 64),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    base=st.sampled_from(["linear", "nf4", "nf4-dq"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merge_equivalence(sizes, r, alpha, dtype, base, bias, seed):
    """The merged product's error against float64 is at most what its dtype's rounding explains."""
    torch.manual_seed(seed)
    inner, outer = sizes
    linear = nn.Linear(inner, outer, bias=bias, dtype=dtype).requires_grad_(False)
    if base != "linear":
        linear = QuantizedLinear(lorax.quantize(linear.weight, base), linear.bias)
    layer = LoRALinear(linear, r, alpha / r)
    layer.lora_A.data.normal_()
    layer.lora_B.data.normal_()
    merged, _ = merged_layer(layer)
    assert merged.weight.dtype == dtype

    W = layer.dense_base().weight.double()
    A, B = layer.lora_A.double(), layer.lora_B.double()
    exact = W + alpha / r * (B @ A)
    u = torch.finfo(dtype).eps / 2
    u32 = torch.finfo(torch.float32).eps / 2
    # One rounding to dtype, and float32's for the product of inner dimension r and the sum.
    size = W.abs() + abs(alpha / r) * (B.abs() @ A.abs())
    smallest = torch.finfo(dtype).smallest_normal
    bound = u * exact.abs() + (r + 3) * u32 * size * (1 + u) + smallest
    in_range = exact.abs() < torch.finfo(dtype).max
    assert ((merged.weight.double() - exact).abs() <= bound)[in_range].all()
    if bias:
        assert torch.equal(merged.bias, linear.bias)


@given(st.integers(1, 16), st.floats(0.1, 64), st.booleans(), st.integers(0, 2**31))
def test_merged_and_unmerged_layers_give_the_same(r, alpha, rslora, seed):
    torch.manual_seed(seed)
    scaling = alpha / (r**0.5 if rslora else r)
    layer = LoRALinear(nn.Linear(40, 24).requires_grad_(False), r, scaling)
    layer.lora_A.data.normal_(std=0.2)
    layer.lora_B.data.normal_(std=0.2)
    x = torch.randn(3, 7, 40)
    with torch.no_grad():
        assert relative_rms(merged_layer(layer)[0](x), layer(x)) <= 2e-6


# --- merging whole models ----------------------------------------------------------------------


def test_merge_in_float32_and_unmerge_bit_equal(model):
    filled(model, r=4)
    base = {n: p.clone() for n, p in model.named_parameters()}
    before = logits(model)
    report = lorax.merge_adapter(model)
    assert relative_rms(logits(model), before) <= 2e-6
    assert report.worst[1] < 1e-5
    lorax.unmerge_adapter(model)
    assert torch.equal(logits(model), before)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in base.items())


def test_smollm2_merge_of_a_trained_adapter_in_float32(smollm2_short):
    model = lorax.load_model(smollm2_short)
    lorax.add_adapter(model, lorax.LoRAConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    ids = tokens(2, 64, 49152)
    base = logits(model, ids)
    for _ in range(4):
        summed_loss(model, ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = logits(model, ids)
    assert relative_rms(before, base) > 0.05  # it learned something
    lorax.merge_adapter(model)
    assert relative_rms(logits(model, ids), before) <= 2e-6


@pytest.mark.parametrize("format", ["nf4", "nf4-dq"])
def test_merging_on_nf4_goes_into_dequantized_weights(format, tmp_path):
    llama().save_pretrained(tmp_path)
    model = filled(lorax.load_model(tmp_path, quantization=format), r=4)
    before = logits(model)
    lorax.merge_adapter(model)
    assert relative_rms(logits(model), before) <= 1e-5
    lorax.unmerge_adapter(model)
    assert torch.equal(logits(model), before)
    lorax.unload_adapter(model, merge=True)
    assert relative_rms(logits(model), before) <= 1e-5
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_merging_in_bfloat16_rounds_once_and_says_what_it_cost(tmp_path):
    llama().save_pretrained(tmp_path)
    model = filled(lorax.load_model(tmp_path, "bfloat16"), r=4)
    report = lorax.merge_adapter(model)
    assert set(report.errors) == set(adapter_layers(model))
    assert 1e-4 < report.worst[1] < 1
    assert "bfloat16" in str(report)
    for layer in adapter_layers(model).values():
        exact = layer.base_layer.weight.float() + layer.delta()
        assert torch.equal(layer.merged.weight, exact.to(torch.bfloat16))


def test_a_tied_head_is_untied_by_merging_and_the_config_says_so(model, tmp_path):
    filled(model, target_modules=["lm_head", "q_proj"])
    embedding = model.model.embed_tokens.weight.clone()
    before = logits(model)
    lorax.unload_adapter(model, merge=True)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert relative_rms(logits(model), before) <= 2e-6
    lorax.save_model(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative_rms(theirs(tokens()).logits, before) <= 2e-6


def test_unload_without_merging_gives_the_base(model):
    before, names = logits(model), [n for n, _ in model.named_parameters()]
    filled(model)
    lorax.unload_adapter(model)
    assert torch.equal(logits(model), before)
    assert [n for n, _ in model.named_parameters()] == names


def test_disabled_adapter_gives_the_base_also_when_merged_or_failing(model):
    base = logits(model)
    filled(model)
    adapted = logits(model)
    assert relative_rms(adapted, base) > 0.01
    with lorax.disabled_adapter(model):
        assert torch.equal(logits(model), base)
    lorax.merge_adapter(model)
    with lorax.disabled_adapter(model):
        assert torch.equal(logits(model), base)
    lorax.unmerge_adapter(model)
    with pytest.raises(ZeroDivisionError), lorax.disabled_adapter(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), adapted)


def test_dropout_sleeps_in_eval_mode_and_while_generating(smollm2_short, smollm2_tokenizer):
    model = lorax.load_model(smollm2_short)
    filled(model, lora_dropout=0.5, target_modules=["q_proj"])
    ids = tokens(1, 8, 49152)
    model.eval()
    quiet = logits(model, ids)
    assert torch.equal(logits(model, ids), quiet)
    model.train()
    assert not torch.equal(logits(model, ids), quiet)
    once = lorax.generate(model, smollm2_tokenizer, "The sea", max_new_tokens=4)
    assert lorax.generate(model, smollm2_tokenizer, "The sea", max_new_tokens=4) == once
    assert model.training


# --- injection ---------------------------------------------------------------------------------


def test_the_adapted_model_is_the_base_at_first_and_only_the_adapter_trains(model):
    before = logits(model)
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules="all-linear"))
    assert torch.equal(logits(model), before)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert not isinstance(model.lm_head, LoRALinear)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
def test_gradients_reach_every_adapter_tensor(checkpointing, quantization, tmp_path):
    llama().save_pretrained(tmp_path)
    model = filled(lorax.load_model(tmp_path, quantization=quantization))
    model.gradient_checkpointing = checkpointing
    model.train()
    model(tokens()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_no_gradient(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model = filled(lorax.load_model(tmp_path), target_modules=["c_attn", "c_fc"])
    grads = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(tokens()).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"target_modules": ["q_proj", "q_porj"]}, "q_porj"),
        ({"target_modules": "q_proj"}, "q_proj"),  # an expression for the whole path
        ({"target_modules": ["input_layernorm"]}, "input_layernorm"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3}}, "k_proj"),
    ],
)
def test_a_refused_config_leaves_the_model_as_it_was(config, word, model):
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(AdapterError, match=word):
        lorax.add_adapter(model, lorax.LoRAConfig(**config))
    assert [(n, id(m)) for n, m in model.named_modules()] == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"r": 0}, "r is 0; expected a whole number"),
        ({"r": 2.5}, "r is 2.5; expected a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "evil"}, "init_lora_weights is 'evil'"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] is -1"),
    ],
)
def test_impossible_values_are_refused_by_name(bad, message):
    with pytest.raises(AdapterError, match=message):
        lorax.LoRAConfig(**bad)


@pytest.mark.parametrize("key", ["kasa_config", "velora_config"])
def test_what_is_not_covered_is_refused_by_name(key):
    with pytest.raises(AdapterError, match=key):
        lorax.LoRAConfig.from_dict({key: ["x"]})


def test_operations_that_the_state_does_not_allow(model, tmp_path):
    for call in (lorax.merge_adapter, lorax.unmerge_adapter, lorax.unload_adapter):
        with pytest.raises(AdapterError, match="no adapter"):
            call(model)
    filled(model)
    with pytest.raises(AdapterError, match="has an adapter already"):
        lorax.add_adapter(model, lorax.LoRAConfig())
    with pytest.raises(AdapterError, match="not merged"):
        lorax.unmerge_adapter(model)
    with pytest.raises(UsageError, match="carries an adapter"):
        lorax.save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    lorax.merge_adapter(model)
    with pytest.raises(AdapterError, match="merged already"):
        lorax.merge_adapter(model)


@pytest.mark.parametrize(
    ("name", "trainable", "config"),
    [
        # The figures of shared/reference/seeds.md, on models of those shapes.
        ("gpt2", 294_912, {"r": 8}),
        ("Llama-7B", 16_777_216, {"r": 16, "target_modules": "qkvo"}),
        ("Llama-2-7B", 4_194_304, {"r": 8}),
        ("Llama-2-7B", 8_388_608, {"r": 16}),
        ("Llama-3.2-1B", 851_968, {"r": 8}),
    ],
)
def test_parameter_counts_that_courses_quote(name, trainable, config, capsys):
    llama_7b = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    }  # fmt: skip
    llama_1b = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    found = {"gpt2": {"model_type": "gpt2"}, "Llama-3.2-1B": llama_1b}.get(name, llama_7b)
    if config.get("target_modules") == "qkvo":
        config = {**config, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    model = new_model(read_config(found, "config"))
    lorax.add_adapter(model, lorax.LoRAConfig(**config))
    assert count_parameters(model)[0] == trainable
    if name == "gpt2":
        lorax.print_trainable_parameters(model)
        assert capsys.readouterr().out == (
            "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364\n"
        )
