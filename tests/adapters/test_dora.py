"""DoRA and lora_bias against the installed PEFT, and DoRA's norms against float64."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from oracles import gpt2, llama, tokens
from peft import PeftModel
from peft_pairs import (
    assert_same_files,
    gradient_errors,
    in_peft,
    largest_difference,
    logits,
    pair,
    relative_rms,
    save,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lorax
from lorax import backend as switch
from lorax.adapters.attached import adapter_layers
from lorax.adapters.dora import DoRALinear, RowNorms, _Rescale
from lorax.adapters.merge import merged_layer
from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear, dequantize_into_scratch
from lorax.training.loss import summed_loss

FLOAT32 = 1e-5

CASES = {
    "dora": (llama, {"use_dora": True, "target_modules": "all-linear"}),
    "dora rslora": (llama, {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "dora head": (llama, {"use_dora": True, "target_modules": ["lm_head", "up_proj"]}),
    "dora gpt2": (gpt2, {"use_dora": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "lora_bias": (gpt2, {"lora_bias": True, "lora_alpha": 24}),
    "lora_bias llama": (llama, {"lora_bias": True, "target_modules": "all-linear"}),
}
DORA = [case for case in CASES if case.startswith("dora")]


def made(case, folder, **more):
    make, config = CASES[case]
    base = make()
    return base, *pair(base, folder, **config, **more)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_and_back(case, tmp_path):
    """Logits; then our own files: the same bytes and fields, and PEFT computes the same of them."""
    base, theirs, mine = made(case, tmp_path)
    assert largest_difference(mine, theirs) <= FLOAT32
    lorax.save_adapter(mine, tmp_path / "mine")
    assert_same_files(tmp_path / "theirs", tmp_path / "mine")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine").eval()
    assert largest_difference(mine, again) <= FLOAT32


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_peft(case, tmp_path):
    _, theirs, mine = made(case, tmp_path, trainable=True)
    for name, error in gradient_errors(mine, theirs).items():
        assert error <= 1e-5, name


@pytest.mark.parametrize("case", ["dora", "dora gpt2"])
def test_dropout_against_peft(case, tmp_path):
    """The same seed drops the same inputs: also the base's path sees them, as in PEFT."""
    _, theirs, mine = made(case, tmp_path, trainable=True, lora_dropout=0.3)
    mine.train()
    theirs.train()
    found = []
    for model in (mine, theirs):
        torch.manual_seed(7)
        y = model(tokens())
        found.append((y if model is mine else y.logits).detach())
    quiet = logits(mine.eval())
    assert relative_rms(found[0], quiet) > 0.01
    assert (found[0] - found[1]).abs().max() <= FLOAT32


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_start_is_the_base_bit_for_bit_and_its_magnitudes_are_peft_s(make, tmp_path):
    base = make()
    base.save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    before = logits(mine)
    config = {"use_dora": True, "target_modules": "all-linear"}
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    assert torch.equal(logits(mine), before)
    assert torch.equal(mine(tokens()).detach(), before)  # with gradients, so without the cache
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, layer in adapter_layers(mine).items():
        expected = theirs.get_submodule(f"base_model.model.{name}.lora_magnitude_vector.default")
        torch.testing.assert_close(layer.lora_magnitude_vector, expected.weight, rtol=1e-6, atol=0)


# --- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_merged_unmerged_and_disabled(case, tmp_path):
    _, theirs, mine = made(case, tmp_path)
    adapted = logits(mine)
    with lorax.disabled_adapter(mine):
        base = logits(mine)
    assert torch.equal(base, logits(lorax.load_model(tmp_path / "base")))
    assert relative_rms(adapted, base) > 0.01
    lorax.merge_adapter(mine)
    assert relative_rms(logits(mine), adapted) <= 2e-6
    lorax.unmerge_adapter(mine)
    assert torch.equal(logits(mine), adapted)
    if case in DORA:
        weight = theirs.merge_and_unload().state_dict()
        for name, layer in adapter_layers(mine).items():
            expected = weight[f"{name}.weight"]
            expected = expected.T if case == "dora gpt2" and "lm_head" not in name else expected
            assert relative_rms(layer.effective_weight(), expected) <= 1e-6


def test_a_merged_bias_is_said_in_the_config_and_transformers_opens_it(tmp_path):
    """PEFT refuses this merge: a Llama's Linears have no bias to merge into."""
    _, theirs, mine = made("lora_bias llama", tmp_path)
    with pytest.raises(RuntimeError, match="no bias"):
        theirs.merge_and_unload()
    adapted = logits(mine)
    lorax.unload_adapter(mine, merge=True)
    lorax.save_model(mine, tmp_path / "merged")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative_rms(opened(tokens()).logits, adapted) <= 2e-6


def test_a_bias_of_some_layers_gives_the_others_zeros(tmp_path):
    _, mine = pair(llama(), tmp_path, lora_bias=True, target_modules=["q_proj"])
    adapted = logits(mine)
    lorax.unload_adapter(mine, merge=True)
    assert mine.config.attention_bias
    assert not mine.config.mlp_bias
    assert torch.equal(mine.model.layers[0].self_attn.o_proj.bias, torch.zeros(48))
    lorax.save_model(mine, tmp_path / "merged")
    assert relative_rms(logits(lorax.load_model(tmp_path / "merged")), adapted) <= 2e-6


def test_a_bias_that_has_no_word_in_the_config_is_not_merged(tmp_path):
    _, mine = pair(llama(), tmp_path, lora_bias=True, target_modules=["lm_head"])
    adapted = logits(mine)
    with pytest.raises(AdapterError, match="lm_head has no bias"):
        lorax.unload_adapter(mine, merge=True)
    assert torch.equal(logits(mine), adapted)
    lorax.merge_adapter(mine)  # in memory there is a place for it
    assert relative_rms(logits(mine), adapted) <= 2e-6


# --- quantized bases ---------------------------------------------------------------------------

EVEN = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
@pytest.mark.parametrize("use_dora", [True, False])
def test_over_a_quantized_base_against_peft(use_dora, format, monkeypatch, tmp_path):
    llama(**EVEN).save_pretrained(tmp_path / "base")
    options = (
        {"load_in_8bit": True}
        if format == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
    )
    base.save_pretrained(tmp_path / "quantized")
    config = {"use_dora": use_dora, "target_modules": ["q_proj", "down_proj"]}
    theirs = in_peft(base, **config)
    save(theirs, tmp_path / "adapter")
    mine = lorax.load_model(tmp_path / "quantized", "float32")
    lorax.load_adapter(mine, tmp_path / "adapter")
    for name, layer in adapter_layers(mine).items():
        assert isinstance(layer.base_layer, QuantizedLinear)
        other = theirs.get_submodule(f"base_model.model.{name}")
        # The frozen product is lorax's on both sides (bitsandbytes' int8 one is not what is tested
        # here); the weights that PEFT takes its norms of are those that bitsandbytes decodes.
        monkeypatch.setattr(other.base_layer, "forward", layer.base_layer.forward)
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            ours, expected = layer(x), other(x)
        assert relative_rms(ours, layer.base_layer(x)) > 0.01
        assert relative_rms(ours, expected) <= 1e-6


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "int8"])
def test_merging_over_a_quantized_base(format, tmp_path):
    """Into dequantized weights; unmerged the base's own bits come back. int8 products round x."""
    llama(**EVEN).save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path, quantization=format)
    base = logits(mine)
    lorax.add_adapter(mine, lorax.LoRAConfig(use_dora=True, target_modules="all-linear"))
    assert torch.equal(logits(mine), base)
    with torch.no_grad():
        for layer in adapter_layers(mine).values():
            layer.lora_B.normal_(std=0.1)
            layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn(layer.out_features))
    adapted = logits(mine)
    lorax.merge_adapter(mine)
    assert relative_rms(logits(mine), adapted) <= (0.05 if format == "int8" else 1e-5)
    lorax.unmerge_adapter(mine)
    assert torch.equal(logits(mine), adapted)
    with lorax.disabled_adapter(mine):
        assert torch.equal(logits(mine), base)


@pytest.mark.parametrize("bias", [False, True])
def test_over_the_kernels_fused_operator(bias):
    """Triton, in its interpreter: base and path are one operator, and DoRA scales what it gives."""
    linear = nn.Linear(64, 32, bias=bias).requires_grad_(False)
    weight = lorax.quantize(linear.weight, "nf4")
    layer = DoRALinear(QuantizedLinear(weight, linear.bias), 4, 2.0)
    layer.initialize(False)
    layer.lora_magnitude_vector.data.mul_(1.5)
    x = torch.randn(5, 64, requires_grad=True)
    found = []
    for backend in ("pytorch", "triton"):
        with switch.backend(backend):
            assert (layer._fused(x) is not None) == (backend == "triton")
            y = layer(x)
            wanted = [x, *layer.tensors().values()]
            found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for plain, fused in zip(*found, strict=True):
        assert relative_rms(fused, plain) <= 1e-5


# --- the norms ---------------------------------------------------------------------------------


@given(
    sizes=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    r=st.integers(1, 20),
    scaling=st.floats(-8, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_norms_against_float64(sizes, r, scaling, dtype, seed):
    """As good as forming V in float32: within what the three sums' cancellation explains."""
    torch.manual_seed(seed)
    out, inner = sizes
    W = torch.randn(out, inner).to(dtype)
    A, B = torch.randn(r, inner) * 0.2, torch.randn(out, r) * 0.2
    found = RowNorms()(lambda: W, A, B, scaling)
    delta = scaling * (B.double() @ A.double())
    exact = (W.double() + delta).norm(dim=1)
    # Squares: each of the sums is right to some u of the sum of absolute values.
    size = W.double().norm(dim=1) + abs(scaling) * (B.double().abs() @ A.double().abs()).norm(dim=1)
    bound = 4e-7 * size.square()
    assert found.dtype == torch.float32
    assert ((found.double().square() - exact.square()).abs() <= bound).all()


def test_norms_in_chunks_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("lorax.adapters.dora.CHUNK_VALUES", 64)
    W, A, B = torch.randn(33, 20).bfloat16(), torch.randn(3, 20), torch.randn(33, 3)
    V = W.float() + 2 * B @ A
    torch.testing.assert_close(RowNorms()(lambda: W, A, B, 2.0), V.norm(dim=1))


def test_the_norm_follows_the_adapter_also_without_gradients():
    """Whatever way A and B are written: torch does not count what goes through .data."""
    layer = DoRALinear(nn.Linear(20, 10).requires_grad_(False), 4, 2.0)
    layer.initialize(True)
    x = torch.randn(3, 20)
    for _ in range(3):
        layer.lora_B.data.normal_()
        layer.lora_A.data[0, 0] += 1
        with torch.no_grad():
            assert relative_rms(layer(x), merged_layer(layer)[0](x)) <= 2e-6
            assert torch.equal(layer(x), layer(x))
        assert relative_rms(layer(x), merged_layer(layer)[0](x)) <= 2e-6


def test_without_gradients_the_base_is_asked_for_its_weight_once(monkeypatch):
    layer = DoRALinear(nn.Linear(20, 10).requires_grad_(False), 4, 2.0)
    layer.initialize(False)
    calls = []
    weight = layer._weight
    monkeypatch.setattr(layer, "_weight", lambda: calls.append(1) or weight())
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(2, 20))
    assert len(calls) == 1


def test_a_row_of_zeros_stays_zeros():
    """PEFT divides zero by zero there, and all the model's logits are NaN."""
    linear = nn.Linear(8, 4).requires_grad_(False)
    linear.weight[1] = 0
    layer = DoRALinear(linear, 2, 1.0)
    layer.initialize(True)
    x = torch.randn(3, 8)
    y = layer(x)
    assert torch.equal(y, linear(x))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.tensors().values())
    merged = merged_layer(layer)[0]
    assert torch.equal(merged.weight[1], linear.weight[1])
    assert relative_rms(merged.weight, linear.weight) <= 1e-6


def test_rescaling_s_gradients_against_autograd():
    u, gain, bias = torch.randn(2, 3, 5), torch.rand(5) + 0.5, torch.randn(5)
    for with_bias in (None, bias):
        inputs = [t.double().requires_grad_() for t in (u, gain)]
        b = None if with_bias is None else with_bias.double().requires_grad_()

        def plain(u, gain, b=b):
            return gain * u if b is None else gain * (u - b) + b

        wanted = [*inputs, *([] if b is None else [b])]
        weights = torch.randn(2, 3, 5).double()
        one = torch.autograd.grad((_Rescale.apply(*inputs, b) * weights).sum(), wanted)
        two = torch.autograd.grad((plain(*inputs) * weights).sum(), wanted)
        for mine, exact in zip(one, two, strict=True):
            assert relative_rms(mine, exact) <= 1e-6


def test_a_gain_near_one_is_not_rounded_away_in_bfloat16():
    gain = torch.tensor([1.003])  # 1.0 in bfloat16
    u = torch.randn(4096, 1).bfloat16()
    exact = (u.double() * gain.double()).bfloat16()
    assert (exact != u).float().mean() > 0.3
    assert (_Rescale.apply(u, gain, None) != exact).float().mean() < 0.01


def test_a_decoded_weight_is_used_again_and_never_another_s():
    one, other = (lorax.quantize(torch.randn(64, 32), "nf4") for _ in range(2))
    for weight in (one, one, other, one, other, other):
        found = dequantize_into_scratch(weight, torch.float32)
        assert torch.equal(found, weight.dequantize(torch.float32))
    other.absmax[0] = 5.0  # somebody tries something out
    found = dequantize_into_scratch(other, torch.float32)
    assert torch.equal(found, other.dequantize(torch.float32))
    with torch.inference_mode():
        third = lorax.quantize(torch.randn(64, 32), "nf4")
        for scale in (1.0, 2.0):
            third.absmax.fill_(scale)
            found = dequantize_into_scratch(third, torch.float32)
            assert torch.equal(found, third.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_no_gradient(dtype, tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path, dtype)
    config = {"use_dora": True, "init_lora_weights": False, "target_modules": "all-linear"}
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    gradients = []
    for mine.gradient_checkpointing in (False, True):
        mine.zero_grad()
        mine(tokens()).float().square().mean().backward()
        gradients.append({n: p.grad for n, p in mine.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_refused_together():
    with pytest.raises(AdapterError, match="lora_bias and use_dora"):
        lorax.LoRAConfig(use_dora=True, lora_bias=True)


class Logits(nn.Module):
    """A model of transformers with the face of ours."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits

    def named_parameters(self, *arguments, **options):
        return self.model.named_parameters(*arguments, **options)


@pytest.mark.nightly
def test_smollm2_against_peft(smollm2_gguf, tmp_path):
    folder, file = smollm2_gguf.rsplit("/", 1)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    ids = tokens(1, 48, 49152)
    theirs = in_peft(base, use_dora=True, target_modules="all-linear", lora_alpha=1)
    save(theirs, tmp_path / "adapter")
    mine = lorax.load_model(smollm2_gguf)
    lorax.load_adapter(mine, tmp_path / "adapter", trainable=True)
    with torch.no_grad():
        expected = theirs(ids).logits
        adapted = mine(ids)
    assert relative_rms(adapted, expected) <= 1e-5
    error = max(gradient_errors(mine, theirs, ids).values())
    # Through 30 layers of random changes PEFT's own two attentions part by as much.
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    noise = max(gradient_errors(Logits(eager), theirs, ids).values())
    print(f"gradients differ by {error:.1e}; PEFT's two attentions by {noise:.1e}")
    assert error <= max(1e-5, 2 * noise)


@pytest.mark.slow
def test_smollm2_merge_of_a_trained_adapter(smollm2_short):
    mine = lorax.load_model(smollm2_short)
    lorax.add_adapter(mine, lorax.LoRAConfig(use_dora=True, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=2e-3)
    ids = tokens(2, 64, 49152)
    base = logits(mine, ids)
    for _ in range(4):
        summed_loss(mine, ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = logits(mine, ids)
    assert relative_rms(adapted, base) > 0.05  # it learned something
    lorax.merge_adapter(mine)
    assert relative_rms(logits(mine, ids), adapted) <= 2e-6
    lorax.unmerge_adapter(mine)
    assert torch.equal(logits(mine, ids), adapted)
