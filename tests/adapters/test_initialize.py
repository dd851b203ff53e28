"""PiSSA, OLoRA and LoftQ against the installed PEFT; and that the base is never written to."""

import copy
import itertools
import json
import logging

import pytest
import torch
from oracles import gpt2, llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft_pairs import config_as_read
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.adapters.counting import count_parameters
from lorax.adapters.loftq import LoftQLinear
from lorax.adapters.lora import LoRALinear
from lorax.adapters.merge import merged_layer
from lorax.adapters.pissa import ResidualLoRALinear
from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear

FLOAT32 = 1e-5

PISSA = {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 12}
OLORA = {"init_lora_weights": "olora", "r": 4, "lora_alpha": 12}
CASES = {
    "pissa": (llama, {**PISSA, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "pissa with patterns": (
        llama,
        {
            **PISSA,
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 7},
            "alpha_pattern": {"layers.1.mlp.down_proj": 3},
        },
    ),
    "pissa on a head": (llama, {**PISSA, "target_modules": ["lm_head", "v_proj"]}),
    "pissa on gpt2": (gpt2, {**PISSA, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "olora": (llama, {**OLORA, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "olora with rslora": (llama, {**OLORA, "target_modules": ["o_proj"], "use_rslora": True}),
}
SHARP = {"target_modules": ["q_proj", "down_proj"]}
HEAD_COPY = "base_model.model.lm_head.base_layer.weight"
LOFTQ = {
    "init_lora_weights": "loftq",
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 3},
    "r": 4,
    "lora_alpha": 4,
    "target_modules": "all-linear",
}


def wide_llama(**changes):
    """Rows of whole blocks of 64: bitsandbytes' CPU code dequantizes others wrongly."""
    return llama(hidden_size=64, intermediate_size=128, num_attention_heads=4, **changes)


@pytest.fixture
def opened(tmp_path):
    """Load what is saved from an oracle's base."""

    def load(base, **options):
        base.save_pretrained(tmp_path / "base")
        return lorax.load_model(tmp_path / "base", **options)

    return load


def logits(model):
    with torch.no_grad():
        out = model(tokens())
    return out if isinstance(out, torch.Tensor) else out.logits


def difference(one, two):
    return (logits(one) - logits(two)).abs().max().item()


def relative_rms(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def weights(model):
    """All that a model consists of, copied: parameters, and quantized codes and scales."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def stir(model):
    """Give A and B values far from their start, as training would."""
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for tensor in layer.tensors().values():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def trained_peft(base, **config):
    """PEFT's model, its adapter moved away from the start."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def adapters_of(theirs, attribute="data"):
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): getattr(p, attribute)
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }


# --- PiSSA and OLoRA against PEFT ---------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_start_is_peft_s_and_the_model_is_its_base(case, opened):
    make, config = CASES[case]
    base = make()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    mine = opened(base)
    before = logits(mine)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    expected = adapters_of(theirs)
    found = {n: p.detach() for n, p in mine.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(mine), before)  # PEFT's is off by up to 4e-6 here


def test_a_randomized_start_is_peft_s_from_the_same_random_state():
    weight = torch.randn(48, 80)
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(80, 48)),
        LoraConfig(target_modules=["0"], r=4, lora_alpha=12),
    ).base_model.model[0]
    theirs.base_layer.weight.data.copy_(weight)
    torch.manual_seed(3)
    theirs.pissa_init("default", "pissa_niter_4")
    base = nn.Linear(80, 48)
    base.weight.data.copy_(weight)
    mine = ResidualLoRALinear(base, 4, 3.0)
    torch.manual_seed(3)
    mine.initialize("pissa_niter_4")
    assert torch.equal(mine.lora_A, theirs.lora_A["default"].weight)
    assert torch.equal(mine.lora_B, theirs.lora_B["default"].weight)
    error = (mine.stored_base() - theirs.base_layer.weight).abs().max()
    assert error <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_files_both_ways(case, opened, tmp_path):
    """PEFT -> lorax -> PEFT: the logits, every tensor's bytes, every field of the config."""
    make, config = CASES[case]
    base = make()
    theirs = trained_peft(base, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = opened(base)
    lorax.load_adapter(mine, tmp_path / "theirs")
    assert difference(mine, base) > 0.01
    assert difference(mine, theirs) <= FLOAT32
    lorax.save_adapter(mine, tmp_path / "mine")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine").eval()
    assert difference(mine, again) <= FLOAT32

    one, two = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "mine"))
    assert set(one) == set(two)
    if HEAD_COPY in one:  # the residual, decomposed on each side
        assert relative_rms(two.pop(HEAD_COPY), one.pop(HEAD_COPY)) <= FLOAT32
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert config_as_read(tmp_path / "mine") == config_as_read(tmp_path / "theirs")


def test_our_residual_is_no_further_from_float64_than_peft_s(opened, tmp_path):
    """On all Linears the two are up to 1.4e-5 apart, each about as far from float64 as its base."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        base = llama()
        theirs = trained_peft(base, **PISSA, target_modules="all-linear")
        theirs.save_pretrained(tmp_path / "adapter")
        mine = opened(base)
        lorax.load_adapter(mine, tmp_path / "adapter")
        exact = copy.deepcopy(base).double()
        for name, layer in adapter_layers(mine).items():
            start, now = (
                layer.scaling * B.double() @ A.double()
                for A, B in ((layer.start_a, layer.start_b), (layer.lora_A, layer.lora_B))
            )
            exact.get_submodule(name).weight.data += now.detach() - start
        for i, model in enumerate((mine, theirs)):
            squares[i] += (logits(model) - logits(exact)).square().sum()
    assert squares[0] <= 1.1 * squares[1]


def test_peft_s_copy_of_a_residual_head_is_known_and_another_base_s_is_not(opened, tmp_path):
    """Beside an adapted head PEFT saves the base's weight: PiSSA's is the residual."""
    base = llama()
    theirs = trained_peft(base, **CASES["pissa on a head"][1])
    theirs.save_pretrained(tmp_path / "adapter")
    copied = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[HEAD_COPY]
    assert relative_rms(copied, base.lm_head.weight) > 0.1
    mine = opened(base)
    mine.lm_head.weight.data[0, 0] += 0.1
    with pytest.raises(AdapterError, match="another base"):
        lorax.load_adapter(mine, tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, opened, tmp_path):
    make, config = CASES[case]
    base = make()
    theirs = trained_peft(base, **config)
    theirs.save_pretrained(tmp_path / "adapter")
    mine = opened(base)
    lorax.load_adapter(mine, tmp_path / "adapter", trainable=True)
    for out in (mine(tokens()), theirs(tokens()).logits):
        out.log_softmax(-1)[..., 5].mean().backward()
    expected = adapters_of(theirs, "grad")
    found = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert relative_rms(gradient, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("case", ["pissa", "olora"])
def test_dropout_is_the_path_s_alone(case, opened):
    """The residual sees all of x; with the same random state the masks are PEFT's."""
    base = llama()
    config = {**CASES[case][1], **SHARP, "lora_dropout": 0.4}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**config)).train()
    mine = opened(base)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    mine.train()
    found = []
    for model in (mine, theirs):
        torch.manual_seed(7)
        found.append(logits(model))
    assert relative_rms(found[0], logits(mine.eval())) > 0.1
    assert relative_rms(*found) <= 2e-6


def test_ten_steps_of_training_against_peft(opened):
    base = llama()
    config = {**PISSA, "target_modules": "all-linear"}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**config)).train()
    mine = opened(base)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    mine.train()
    losses = []
    for model in (mine, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        run = []
        for _ in range(10):
            out = model(tokens())
            out = out if isinstance(out, torch.Tensor) else out.logits
            loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- the base is never written to ---------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_3", "olora"])
def test_the_base_survives_everything(how, quantization, opened, tmp_path):
    model = opened(wide_llama(), quantization=quantization)
    before, base = weights(model), logits(model)
    lorax.add_adapter(model, lorax.LoRAConfig(init_lora_weights=how, r=4, lora_alpha=12, **SHARP))
    assert torch.equal(logits(model), base)
    model.train()
    model(tokens()).square().mean().backward()
    assert all(
        p.grad.abs().max() > 0
        for layer in adapter_layers(model).values()
        for p in layer.tensors().values()
    )
    stir(model.eval())
    adapted = logits(model)
    assert relative_rms(adapted, base) > 0.05
    with lorax.disabled_adapter(model):
        assert torch.equal(logits(model), base)
    lorax.merge_adapter(model)
    # R13; LLM.int8 also rounds the activations, so the merged model may differ by that much.
    bound = {None: 2e-6, "int8": 0.05}.get(quantization, 1e-5)
    assert relative_rms(logits(model), adapted) <= bound
    with lorax.disabled_adapter(model):
        assert torch.equal(logits(model), base)
    lorax.unmerge_adapter(model)
    assert torch.equal(logits(model), adapted)
    lorax.save_adapter(model, tmp_path / "adapter")
    lorax.unload_adapter(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model), base)


def test_peft_itself_leaves_the_residual_behind(opened):
    """Why this matters: after unload() its base is another model. Ours is not."""
    base = llama()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**PISSA, target_modules=["q_proj"]))
    assert difference(theirs.unload(), base) > 0.1
    mine = opened(base)
    before = logits(mine)
    lorax.add_adapter(mine, lorax.LoRAConfig(**PISSA, target_modules=["q_proj"]))
    lorax.unload_adapter(mine)
    assert torch.equal(logits(mine), before)


def test_a_tied_head_starts_without_touching_the_embedding(opened, tmp_path, caplog):
    """PEFT takes the start out of the one tensor that head and embedding share."""
    base = llama(tie_word_embeddings=True)
    config = {**PISSA, "target_modules": ["lm_head", "q_proj"]}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    assert difference(theirs.eval(), base) > 0.1
    mine = opened(base)
    before = logits(mine)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    assert torch.equal(logits(mine), before)
    stir(mine)
    lorax.save_adapter(mine, tmp_path / "adapter")
    assert "tied head" in caplog.text
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert difference(mine, again) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_survive_a_16_bit_base(dtype):
    """An update below the last bit of A reaches the output: the differences are float32's."""
    base = nn.Linear(64, 48, bias=False, dtype=dtype).requires_grad_(False)
    layer = ResidualLoRALinear(base, 8, 1.0)
    layer.initialize("pissa")
    x = torch.randn(32, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))
        layer.lora_A.mul_(1 + 2.0**-14)
        A, B = layer.factors()
        exact = (
            base.weight.double()
            + (layer.lora_B.double() @ layer.lora_A.double())
            - (layer.start_b.double() @ layer.start_a.double())
        )
        path = x.double() @ (exact - base.weight.double()).t()
        found = (x @ A.to(dtype).t()) @ B.to(dtype).t()
        assert relative_rms(found.double(), path) <= 0.02
        # What the difference of two 16-bit products would have given.
        rough = layer.scaling * (x @ layer.lora_A.to(dtype).t()) @ layer.lora_B.to(dtype).t()
        rough -= layer.scaling * (x @ layer.start_a.to(dtype).t()) @ layer.start_b.to(dtype).t()
        assert relative_rms(rough.double(), path) >= 0.5
        merged, _ = merged_layer(layer)
    assert (merged.weight.double() - exact).abs().max() <= torch.finfo(
        dtype
    ).eps * exact.abs().max()


# --- what a file does not determine: the plain form ----------------------------------------------


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"init_lora_weights": "pissa_niter_2", "r": 4, **SHARP}, "random"),
        (
            {
                "init_lora_weights": "pissa_niter_2",
                "r": 4,
                "use_rslora": True,
                "rank_pattern": {"down_proj": 7},
                "alpha_pattern": {"q_proj": 3},
                **SHARP,
            },
            "random",
        ),
    ],
)
def test_a_random_start_is_saved_as_a_plain_lora(config, word, opened, tmp_path, caplog):
    base = llama()
    mine = opened(base)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    stir(mine)
    with pytest.raises(AdapterError, match=word):
        lorax.save_adapter(mine, tmp_path / "refused", plain=False)
    assert not (tmp_path / "refused").exists()
    lorax.save_adapter(mine, tmp_path / "adapter")
    assert word in caplog.text
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert difference(mine, theirs) <= FLOAT32
    again = lorax.load_model(tmp_path / "base")
    loaded = lorax.load_adapter(again, tmp_path / "adapter")
    assert loaded.r == 8
    assert loaded.init_lora_weights is True
    assert difference(mine, again) <= FLOAT32


@pytest.mark.parametrize("case", ["pissa", "olora", "pissa with patterns", "pissa on gpt2"])
def test_the_plain_form_on_request(case, opened, tmp_path, caplog):
    make, config = CASES[case]
    base = make()
    mine = opened(base)
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    stir(mine)
    lorax.save_adapter(mine, tmp_path / "adapter", plain=True)
    assert not caplog.text
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert difference(mine, theirs) <= FLOAT32


def test_the_conversion_is_peft_s(opened, tmp_path):
    """Its own [B, -B0] [A; A0] and ours are one matrix."""
    base = llama()
    config = {**PISSA, **SHARP}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    theirs.save_pretrained(tmp_path / "adapter")
    mine = opened(base)
    lorax.load_adapter(mine, tmp_path / "adapter")
    lorax.save_adapter(mine, tmp_path / "mine", plain=True)
    one, two = (lorax.read_adapter(tmp_path / where) for where in ("converted", "mine"))
    assert one.plain_config() == two.plain_config()
    for name, layer in one.layers.items():
        assert relative_rms(two.layers[name].dense(), layer.dense()) <= 1e-6


def test_adapters_over_quantized_bases_are_saved_plain(opened, tmp_path, caplog):
    base = wide_llama()
    mine = opened(base, quantization="nf4")
    lorax.add_adapter(mine, lorax.LoRAConfig(**OLORA, **SHARP))
    stir(mine)
    lorax.save_adapter(mine, tmp_path / "adapter")
    assert "nf4" in caplog.text
    again = lorax.load_model(tmp_path / "base", quantization="nf4")
    lorax.load_adapter(again, tmp_path / "adapter")
    assert difference(mine, again) <= FLOAT32


def test_olora_on_gpt2_is_right_here_and_saved_plain(opened, tmp_path, caplog):
    """PEFT decomposes the transposed weight there: its adapted model is not its base."""
    base = gpt2()
    config = {**OLORA, "target_modules": r".*\.attn\.c_proj"}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **config))
    assert difference(theirs.eval(), base) > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    mine = opened(base)
    before = logits(mine)
    with pytest.raises(AdapterError, match="transposed"):
        lorax.load_adapter(mine, tmp_path / "theirs")
    lorax.add_adapter(mine, lorax.LoRAConfig(**config))
    assert torch.equal(logits(mine), before)
    stir(mine)
    lorax.save_adapter(mine, tmp_path / "adapter")
    assert "transposed" in caplog.text
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert difference(mine, again) <= FLOAT32


@pytest.mark.parametrize(
    ("config", "changes", "quantization", "word"),
    [
        ({**PISSA, "init_lora_weights": "pissa_niter_2"}, {}, None, "at random"),
        (PISSA, {}, "nf4", "over a base in nf4"),
        (OLORA, {}, "int8", "over a base in int8"),
        ({**PISSA, "target_modules": ["lm_head"]}, {"tie_word_embeddings": True}, None, "tied"),
    ],
)
def test_a_file_that_does_not_hold_its_start_is_refused(
    config, changes, quantization, word, opened, tmp_path
):
    base = llama(**changes)
    trained_peft(base, **{**SHARP, **config}).save_pretrained(tmp_path / "adapter")
    model = opened(base, quantization=quantization)
    names, out = [(n, id(m)) for n, m in model.named_modules()], logits(model)
    with pytest.raises(AdapterError, match=word) as refused:
        lorax.load_adapter(model, tmp_path / "adapter")
    assert "plain LoRA" in str(refused.value)
    assert [(n, id(m)) for n, m in model.named_modules()] == names
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_convert_to_lora(how, opened):
    model = opened(llama())
    config = lorax.LoRAConfig(**{**PISSA, "init_lora_weights": how}, **SHARP, use_rslora=True)
    lorax.add_adapter(model, config)
    stir(model)
    before = logits(model)
    lorax.convert_to_lora(model)
    assert all(type(layer) is LoRALinear for layer in adapter_layers(model).values())
    assert (logits(model) - before).abs().max() <= FLOAT32
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    for name, layer in adapter_layers(model).items():
        assert layer.r == model.adapter_config.rank(name) == 8
        assert layer.scaling == pytest.approx(model.adapter_config.scaling(name), rel=1e-12)
    with pytest.raises(AdapterError, match="plain LoRA already"):
        lorax.convert_to_lora(model)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({**PISSA, "r": 17, "target_modules": "all-linear"}, "k_proj: .* has 16 components"),
        ({**PISSA, "lora_alpha": -1, **SHARP}, "scale is -0.25"),
        ({**LOFTQ, "lora_alpha": 0}, "scale is 0"),
        ({**OLORA, "target_modules": ["embed_tokens"]}, "embed_tokens: OLoRA goes with Linears"),
    ],
)
def test_what_cannot_start_is_refused_by_name(config, word, opened):
    model = opened(llama())
    names = [(n, id(m)) for n, m in model.named_modules()]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(AdapterError, match=word):
        lorax.add_adapter(model, lorax.LoRAConfig(**config))
    assert [(n, id(m)) for n, m in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_base_that_is_not_finite_is_refused(opened):
    model = opened(llama())
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj: .*not finite"):
        lorax.add_adapter(model, lorax.LoRAConfig(**PISSA, **SHARP))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"init_lora_weights": "pissa_niter_"}, "pissa_niter_"),
        ({"init_lora_weights": "evil"}, "evil"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}, "loftq_bits is 8"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter is 0"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "bits"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_format": "fp4"}}, "fp4"),
    ],
)
def test_impossible_starts_are_refused_by_name(bad, word):
    with pytest.raises(AdapterError, match=word):
        lorax.LoRAConfig(**bad)


# --- LoftQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
def test_loftq_is_peft_s_bit_for_bit(times, loftq_on_a_cpu):
    weight = torch.randn(48, 128)
    base = nn.Linear(128, 48)
    base.weight.data.copy_(weight)
    Q, A, B = loftq_on_a_cpu(weight, num_bits=4, reduced_rank=4, num_iter=times)
    mine = LoftQLinear(base, 4, 1.0, iterations=times)
    mine.initialize("loftq")
    assert torch.equal(mine.frozen_weight(), Q)
    assert torch.equal(mine.lora_A, A)
    assert torch.equal(mine.lora_B, B)
    assert torch.equal(base.weight, weight)


def loftq_error(weight, times, format="nf4", alpha=8, r=8):
    base = nn.Linear(*weight.shape[::-1], bias=False)
    base.weight.data.copy_(weight)
    layer = LoftQLinear(base, r, alpha / r, iterations=times, format=format)
    layer.initialize("loftq")
    return (layer.effective_weight(torch.float64) - weight.double()).norm().item()


@pytest.mark.parametrize("format", ["nf4", "nf4-dq"])
def test_loftq_s_error_falls_with_iterations(format):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(96, 128, generator=generator)
    plain = lorax.quantize(weight, format).dequantize() - weight
    errors = [loftq_error(weight, times, format) for times in (1, 2, 3, 4, 5)]
    assert errors[0] < plain.norm().item()
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_loftq_s_start_is_near_the_weight_for_any_alpha():
    """PEFT's ignores the scale: at lora_alpha = 2 r it is further away than Q alone."""
    weight = torch.randn(96, 128)
    Q = lorax.quantize(weight, "nf4").dequantize()
    one, two = (loftq_error(weight, 1, alpha=alpha) for alpha in (8, 16))
    assert two == pytest.approx(one, rel=1e-5)
    layer = LoftQLinear(nn.Linear(128, 96), 8, 1.0, iterations=1)
    layer.base_layer.weight.data.copy_(weight)
    layer.initialize("loftq")
    with torch.no_grad():
        theirs = Q + 2 * layer.lora_B @ layer.lora_A
    assert (theirs - weight).norm() > 0.999 * (Q - weight).norm() > one


def test_loftq_files_both_ways(opened, tmp_path, loftq_on_a_cpu):
    base = wide_llama()
    theirs = trained_peft(base, **LOFTQ)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = opened(base)
    lorax.load_adapter(mine, tmp_path / "theirs")
    assert difference(mine, theirs) <= FLOAT32
    lorax.save_adapter(mine, tmp_path / "mine")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine").eval()
    assert difference(mine, again) <= FLOAT32
    one, two = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "mine"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    found, expected = (
        json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("mine", "theirs")
    )
    assert found["loftq_config"] == expected["loftq_config"]
    assert found["init_lora_weights"] == expected["init_lora_weights"] == "loftq"


def test_loftq_gradients(opened, tmp_path, loftq_on_a_cpu):
    base = wide_llama()
    theirs = trained_peft(base, **LOFTQ)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = opened(base)
    lorax.load_adapter(mine, tmp_path / "theirs", trainable=True)
    for out in (mine(tokens()), theirs(tokens()).logits):
        out.log_softmax(-1)[..., 5].mean().backward()
    expected = adapters_of(theirs, "grad")
    for name, parameter in mine.named_parameters():
        if parameter.requires_grad:
            assert relative_rms(parameter.grad, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loftq_gives_the_original_back(dtype, opened):
    model = opened(llama(), dtype=dtype)
    before, base = weights(model), logits(model)
    config = {**LOFTQ, "loftq_config": {"loftq_iter": 2, "loftq_format": "nf4-dq"}}
    lorax.add_adapter(model, lorax.LoRAConfig(**config))
    layers = adapter_layers(model)
    assert all(isinstance(layer.quantized, QuantizedLinear) for layer in layers.values())
    stir(model)
    adapted = logits(model)
    assert relative_rms(adapted, base) > 0.05
    with lorax.disabled_adapter(model):
        assert torch.equal(logits(model), base)
    lorax.merge_adapter(model)
    assert relative_rms(logits(model), adapted) <= (1e-5 if dtype == "float32" else 0.05)
    lorax.unmerge_adapter(model)
    assert torch.equal(logits(model), adapted)
    lorax.unload_adapter(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_loftq_s_memory():
    """Beside the base: 4.5 bits a weight, and the factors."""
    base = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = LoftQLinear(base, 4, 1.0, iterations=1)
    layer.initialize("loftq")
    assert layer.quantized.quantized.nbytes == 256 * 128 * 4.5 / 8
    assert layer.quantized.bias is None
    assert count_parameters(layer) == (4 * (256 + 128), 256 * 128 + 4 * (256 + 128))


def test_loftq_s_base_by_itself(opened, tmp_path):
    """convert_to_lora keeps the quantized base: a plain adapter over a 4-bit checkpoint."""
    model = opened(wide_llama())
    lorax.add_adapter(model, lorax.LoRAConfig(**LOFTQ))
    stir(model)
    before = logits(model)
    with pytest.raises(AdapterError, match="convert_to_lora"):
        lorax.save_adapter(model, tmp_path / "adapter", plain=True)
    lorax.convert_to_lora(model)
    assert torch.equal(logits(model), before)
    lorax.save_adapter(model, tmp_path / "adapter")
    lorax.unload_adapter(model)
    lorax.save_model(model, tmp_path / "four-bit")
    again = lorax.load_model(tmp_path / "four-bit")
    assert isinstance(again.model.layers[0].self_attn.q_proj, QuantizedLinear)
    lorax.load_adapter(again, tmp_path / "adapter")
    assert (logits(again) - before).abs().max() <= FLOAT32


@pytest.mark.parametrize(
    ("options", "changes", "word"),
    [
        ({"quantization": "nf4"}, {}, "q_proj: .*base in nf4"),
        ({}, {"tie_word_embeddings": True}, "lm_head is tied"),
    ],
)
def test_loftq_where_it_makes_no_sense(options, changes, word, opened):
    model = opened(llama(**changes), **options)
    config = {**LOFTQ, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(AdapterError, match=word):
        lorax.add_adapter(model, lorax.LoRAConfig(**config))
    assert not adapter_layers(model)


def test_a_format_that_peft_does_not_know_is_said(opened, tmp_path, caplog):
    model = opened(llama())
    config = {**LOFTQ, "loftq_config": {"loftq_format": "nf4-dq"}}
    lorax.add_adapter(model, lorax.LoRAConfig(**config))
    with caplog.at_level(logging.WARNING):
        lorax.save_adapter(model, tmp_path / "adapter")
    assert "loftq_format" in caplog.text
    again = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


# --- a real model --------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_start_inside_smollm2(how, smollm2_gguf, tmp_path):
    folder, file = smollm2_gguf.rsplit("/", 1)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    config = {"init_lora_weights": how, "r": 8, "target_modules": ["q_proj", "v_proj"]}
    config["layers_to_transform"] = [0, 7, 15, 29]
    mine = lorax.load_model(smollm2_gguf)
    ids = tokens(1, 32, 49152)
    with torch.no_grad():
        before = mine(ids)
        lorax.add_adapter(mine, lorax.LoRAConfig(**config))
        assert torch.equal(mine(ids), before)
        for layer in adapter_layers(mine).values():
            for tensor in layer.tensors().values():
                tensor.add_(torch.randn_like(tensor) * 0.02)
        adapted = mine(ids)
        assert relative_rms(adapted, before) > 0.02
        for plain in (None, True):
            lorax.save_adapter(mine, tmp_path / str(plain), plain=plain)
            theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(plain)).eval()
            assert relative_rms(theirs(ids).logits, adapted) <= FLOAT32
        lorax.unload_adapter(mine)
        assert torch.equal(mine(ids), before)
