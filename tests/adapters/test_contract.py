"""What every registered variant holds, whatever it computes; its own maths is in its own file.

A variant that registers itself is listed here with the settings that ask for it, and a test says
so where one is not.
"""

import copy

import pytest
import torch
from oracles import gpt2, llama
from torch import nn

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.adapters.counting import count_parameters
from lorax.adapters.inject import disabled_adapter
from lorax.adapters.merge import merge_adapter, unmerge_adapter
from lorax.adapters.variants import resolved, variant_of, variants
from lorax.errors import AdapterError

IDS = torch.arange(3, 35).reshape(2, 16)
MERGED = 2e-6  # of the logits' size, in float32: another order of the same sums
NEAR = 2e-6  # a start that is the base's up to float32's rounding of norms

LINEARS = {"r": 4, "target_modules": r".*\.(q_proj|up_proj|c_attn|c_fc)"}
TABLES = {"r": 4, "target_modules": r".*\.(embed_tokens|wte|q_proj|c_attn)"}
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10}
ADALORA["target_modules"] = LINEARS["target_modules"]

# case -> (the variant that it is, its config's fields)
CASES = {
    "lora": ("lora", LINEARS),
    "lora on an embedding": ("lora", TABLES),
    "rslora": ("rslora", {**LINEARS, "use_rslora": True}),
    "lora_bias": ("lora_bias", {**LINEARS, "lora_bias": True}),
    "dora": ("dora", {**LINEARS, "use_dora": True}),
    "dora on an embedding": ("dora", {**TABLES, "use_dora": True}),
    "pissa": ("pissa", {**LINEARS, "init_lora_weights": "pissa"}),
    "olora": ("olora", {**LINEARS, "init_lora_weights": "olora"}),
    "loftq": ("loftq", {**LINEARS, "init_lora_weights": "loftq"}),
    "adalora": ("adalora", ADALORA),
    "prompt-tuning": ("prompt-tuning", {"num_virtual_tokens": 3}),
}
STARTS_ELSEWHERE = {"loftq", "prompt-tuning"}  # a quantized base; tokens in front of the text
BASES = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, make in BASES.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name])
    return made


@pytest.fixture(params=BASES)
def base(request, folders):
    return lorax.load_model(folders[request.param])


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(base, case):
    lorax.add_adapter(base, made(case))
    return base


def made(case):
    name, fields = CASES[case]
    return variants()[name].config(**copy.deepcopy(fields))


def moved(model):
    """Every trained tensor away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS)


def far(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def test_every_registered_variant_is_here():
    """vera, from the trial's plugin, has a trial of its own."""
    with_adapter = {name for name, v in variants().items() if v.config is not None} - {"vera"}
    assert with_adapter == {name for name, _ in CASES.values()}


def test_the_table_finds_it(case):
    assert variant_of(made(case)).name == CASES[case][0]


def test_it_starts_as_the_base_or_says_that_it_does_not(base, case):
    before = logits(base)
    lorax.add_adapter(base, made(case))
    gap = far(logits(base), before)
    if CASES[case][0] in STARTS_ELSEWHERE:
        assert gap > 1e-3
        return
    exact = all(layer.starts_exact for layer in adapter_layers(base).values())
    assert gap == 0 if exact else gap <= NEAR


def test_gradients_reach_every_tensor(model):
    moved(model)(IDS).square().mean().backward()
    for name, layer in adapter_layers(model).items():
        for below, tensor in layer.tensors().items():
            assert tensor.grad is not None, f"{name}.{below}"
            assert tensor.grad.abs().sum() > 0, f"{name}.{below}"
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    layers = adapter_layers(model).values()
    assert trained == {id(t) for layer in layers for t in layer.tensors().values()}


def test_a_file_brings_every_bit_back(model, tmp_path):
    moved(model)
    lorax.save_adapter(model, tmp_path / "adapter")
    again = lorax.load_model(model.name_or_path)
    config = lorax.load_adapter(again, tmp_path / "adapter")
    if is_determined(model):
        assert variant_of(config) is variant_of(model.adapter_config)
        for name, layer in adapter_layers(model).items():
            for below, tensor in layer.tensors().items():
                assert torch.equal(tensor, adapter_layers(again)[name].tensors()[below])
        assert torch.equal(logits(again), logits(model))
    else:
        assert far(logits(again), logits(model)) <= MERGED


def is_determined(model):
    """False where the file is a plain LoRA, since PEFT's form does not hold the start."""
    from lorax.adapters.convert import start_is_lost

    config = model.adapter_config
    if not variant_of(config).is_around_modules:
        return True
    bases = {name: layer.base_layer for name, layer in adapter_layers(model).items()}
    return start_is_lost(model, config, bases) is None


def test_merged_computes_what_unmerged_computes_and_unmerging_gives_the_bits_back(model, case):
    moved(model)
    before = logits(model)
    if variant_of(model.adapter_config).no_merge:
        with pytest.raises(AdapterError, match="can not be merged"):
            merge_adapter(model)
        assert torch.equal(logits(model), before)
        return
    merge_adapter(model)
    assert far(logits(model), before) <= MERGED
    unmerge_adapter(model)
    assert torch.equal(logits(model), before)


def test_disabled_and_unloaded_it_is_the_base(base, case):
    before = logits(base)
    lorax.add_adapter(base, made(case))
    moved(base)
    with disabled_adapter(base):
        assert torch.equal(logits(base), before)
    assert not torch.equal(logits(base), before)
    lorax.unload_adapter(base)
    assert torch.equal(logits(base), before)


def test_a_copy_has_the_state_and_none_of_the_memory(model):
    moved(model)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    moved(twin)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_a_state_dict_brings_every_bit_back(model, case, folders):
    moved(model)
    again = lorax.load_model(model.name_or_path)
    lorax.add_adapter(again, made(case))
    again.load_state_dict(model.state_dict())
    if case != "loftq":  # its copy's bytes are no state; they are made of the same base
        assert torch.equal(logits(again), logits(model))


def test_it_counts_its_tensors_once(base, case):
    _, everything = count_parameters(base)
    lorax.add_adapter(base, made(case))
    tensors = {
        id(t): t for layer in adapter_layers(base).values() for t in layer.tensors().values()
    }
    own = sum(tensor.numel() for tensor in tensors.values())
    assert count_parameters(base) == (own, everything + own)


def test_what_it_says_about_itself_is_one_line(case):
    variant = variant_of(made(case))
    line = variant.summary(made(case))
    assert line
    assert "\n" not in line
    for path in (variant.layer, variant.embedding):
        assert path is None or issubclass(resolved(path), nn.Module)


def test_an_embedding_that_it_does_not_cover_is_refused_by_name(base, case):
    variant = variant_of(made(case))
    if not variant.is_around_modules or variant.embedding is not None:
        return
    name = base.embedding_name.removesuffix(".weight")
    fields = {**CASES[case][1], "target_modules": [name]}
    with pytest.raises(AdapterError, match=f"{variant.title} goes with Linears"):
        lorax.add_adapter(base, type(made(case))(**fields))
    assert not adapter_layers(base)
