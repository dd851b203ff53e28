"""The fast path in whole models: against PEFT, and where it has to step back."""

import copy
import gc
import pickle

import pytest
import torch
from oracles import LLAMA_KINDS, gpt2, llama, mistral, tokens
from peft_pairs import in_peft, pair, save, trained
from step_gradients import assert_close, gradients, mine_of, theirs_of
from tiny_runs import folder, recipe  # noqa: F401

import lorax
from lorax.training.fast import products
from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss

ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(params=["as this CPU has it", "oneDNN"])
def product(request, monkeypatch):
    if request.param == "oneDNN":
        monkeypatch.setattr(products, "prefers_onednn", lambda: True)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("kind", LLAMA_KINDS.values(), ids=list(LLAMA_KINDS))
def test_every_kind_of_llama_against_peft(kind, tmp_path):
    theirs, mine = pair(llama(**kind), tmp_path, trainable=True, **ALL)
    ids = tokens(3, 23)
    assert_close(mine_of(mine, ids), theirs_of(theirs, ids))


CONFIGS = {
    "q and v": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "down alone": {"r": 2, "target_modules": ["down_proj"]},
    "one layer": {"r": 3, "target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]},
    "rslora with patterns": {
        **ALL,
        "use_rslora": True,
        "rank_pattern": {"up_proj": 7},
        "alpha_pattern": {"k_proj": 5},
    },
    "B with a bias": {**ALL, "lora_bias": True},
    "a trained bias": {**ALL, "bias": "all"},
    "the head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_choice_of_modules_against_peft(config, tmp_path):
    base = llama(mlp_bias=True, attention_bias=True)
    theirs, mine = pair(base, tmp_path, trainable=True, **config)
    ids = tokens(2, 17)
    assert_close(mine_of(mine, ids), theirs_of(theirs, ids))


FAMILIES = {"gpt2": gpt2, "mistral with a window": lambda: mistral(sliding_window=5)}


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("make", FAMILIES.values(), ids=list(FAMILIES))
def test_other_families_against_peft(make, tmp_path):
    theirs, mine = pair(make(), tmp_path, trainable=True, **ALL)
    ids = tokens(2, 17)
    assert_close(mine_of(mine, ids), theirs_of(theirs, ids))


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "fp4"])
def test_quantized_bases_against_peft_over_dequantized_weights(format, tmp_path):
    llama(hidden_size=64, num_attention_heads=4, intermediate_size=128).save_pretrained(
        tmp_path / "base"
    )
    mine = lorax.load_model(tmp_path / "base", quantization=format)
    dense = lorax.load_model(tmp_path / "base")
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            W = mine.get_submodule(name).quantized.dequantize(torch.float32)
            module.weight.data.copy_(W)
    lorax.save_model(dense, tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    theirs = in_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), **ALL)
    save(theirs, tmp_path / "theirs")
    lorax.load_adapter(mine, tmp_path / "theirs", trainable=True)
    ids = tokens(2, 17)
    assert_close(mine_of(mine, ids), theirs_of(theirs, ids))


def bfloat16_errors(seed, where):
    """Of each gradient, ours and PEFT's, against PEFT in float32 with the same bfloat16 values."""
    torch.manual_seed(seed)
    base = llama(hidden_size=96, num_attention_heads=4, intermediate_size=192)
    theirs, mine = pair(base.to(torch.bfloat16), where, trainable=True, **ALL)
    for model in (mine, theirs):  # both train float32 adapters; B is small, as it starts at zero
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float() * (0.1 if "lora_B" in name else 1)
    ids = tokens(4, 40, seed=seed)
    _, truth = theirs_of(copy.deepcopy(theirs).float(), ids)
    found = mine_of(mine, ids)[1], theirs_of(theirs, ids)[1]
    return [[(side[n] - e).norm() / e.norm() for n, e in truth.items()] for side in found]


@pytest.mark.parametrize("native", [True, False], ids=["bfloat16 products", "through float32"])
def test_bfloat16_is_no_further_from_float32_than_pefts(native, tmp_path, monkeypatch):
    """The mean over all tensors of four models, within what chance does to such a mean."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: native)
    errors = torch.tensor([bfloat16_errors(seed, tmp_path / str(seed)) for seed in range(4)])
    ours, theirs = errors.mean(dim=2).unbind(1)  # each (models,)
    further = ours - theirs
    print(f"ours {ours.mean():.4f}, PEFT's {theirs.mean():.4f}")
    assert further.mean() <= 2 * further.std() / len(further) ** 0.5


def test_dropout_draws_the_plain_paths_numbers(tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL, lora_dropout=0.3, init_lora_weights=False))
    mine.train()
    ids = tokens(2, 17)
    found = []
    for fast in (True, False):
        torch.manual_seed(5)
        found.append(mine_of(mine, ids, fast))
    assert_close(*found)


# --- stepping back --------------------------------------------------------------------------------


VARIANTS = {
    "dora": {**ALL, "use_dora": True},
    "int8 base": ALL,
}


@pytest.mark.parametrize("kind", list(VARIANTS))
def test_what_is_not_known_stays_bit_equal(kind, tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path, quantization="int8" if "int8" in kind else None)
    lorax.add_adapter(mine, lorax.LoRAConfig(**VARIANTS[kind]))
    layer = mine.model.layers[0]
    with accelerated(mine):
        for module in (layer.mlp, layer.self_attn.q_proj, layer.mlp.down_proj):
            x = torch.randn(2, 7, 48 if module is not layer.mlp.down_proj else 80)
            assert torch.equal(module(x), type(module).forward(module, x))


def test_a_hook_sees_every_module(tmp_path):
    """Forward hooks, and those of a module inside, fire as on the plain path."""
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL))
    layer = mine.model.layers[1]
    watched = [layer.mlp.up_proj, layer.self_attn.k_proj.base_layer, layer.mlp.down_proj]
    seen = []
    for module in watched:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    mine_of(mine, tokens())
    assert {id(module) for module in seen} == {id(module) for module in watched}


@pytest.mark.parametrize("place", ["mlp", "self_attn.q_proj", "mlp.down_proj.base_layer"])
def test_a_forward_that_somebody_put_on_a_module_is_called_and_stays(place, tmp_path):
    """As programs do that move weights about."""
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL))
    module, called = mine.model.layers[1].get_submodule(place), []
    inner = module.forward

    def forward(x):
        called.append(x.shape)
        return inner(x)

    module.forward = forward
    mine_of(mine, tokens())
    assert len(called) == 1
    assert module.forward is forward


def test_switched_off_and_merged_adapters_are_not_computed(tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL, init_lora_weights=False))
    ids = tokens()
    with accelerated(mine), torch.no_grad():
        with lorax.disabled_adapter(mine):
            torch.testing.assert_close(mine(ids), lorax.load_model(tmp_path)(ids))
        adapted = mine(ids)
        lorax.merge_adapter(mine)
        torch.testing.assert_close(mine(ids), adapted, rtol=1e-4, atol=1e-4)


def test_the_model_is_as_before_when_it_is_over(tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL))
    before = {id(m): set(vars(m)) for m in mine.modules()}
    with pytest.raises(RuntimeError, match="stop"), accelerated(mine):
        raise RuntimeError("stop")
    assert {id(m): set(vars(m)) for m in mine.modules()} == before


def test_a_copy_computes_with_its_own_weights(tmp_path):
    """A callback may copy or pickle the model while a run is under way."""
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL, init_lora_weights=False))
    ids = tokens()
    with accelerated(mine), torch.no_grad():
        copied, pickled = copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))  # noqa: S301
        expected = mine(ids)
        for p in trained(mine).values():
            p.zero_()
        for other in (copied, pickled):
            torch.testing.assert_close(other(ids), expected)


def test_gradient_checkpointing_gives_the_same_bits(tmp_path):
    llama().save_pretrained(tmp_path)
    mine = lorax.load_model(tmp_path)
    lorax.add_adapter(mine, lorax.LoRAConfig(**ALL, lora_dropout=0.2, init_lora_weights=False))
    mine.train()
    ids, found = tokens(), []
    for on in (False, True):
        mine.gradient_checkpointing = on
        torch.manual_seed(0)
        mine.zero_grad()
        with accelerated(mine):
            summed_loss(mine, ids, ids).backward()
        found.append(gradients(mine))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"data.packing": True}, {"model.quantization": "nf4"}])
def test_a_run_is_the_plain_one_but_for_rounding(folder, tmp_path, how):  # noqa: F811
    found = {}
    for fast in (True, False):
        overrides = {"train.fast": fast, **how}
        found[fast] = lorax.train(recipe(folder, tmp_path / str(fast), **overrides)).metrics
    for mine, plain in zip(found[True], found[False], strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & set(plain):
            assert mine[key] == pytest.approx(plain[key], rel=1e-4), key


def test_the_default_run_takes_the_fast_path(folder, tmp_path, monkeypatch):  # noqa: F811
    """While it lasts each LoRALinear computes by its own method, and none does afterwards."""
    seen = []

    def look(line, model):
        seen.append(fast_modules(model))

    run = lorax.train(recipe(folder, tmp_path / "run"), callbacks=[look])
    assert (
        min(seen) == max(seen) == 3 * (7 + 1 + 1) + 7
    )  # Linears, MLP and attention of 3 layers; norms
    assert fast_modules(run.model) == 0
    plain = recipe(folder, tmp_path / "plain", **{"train.fast": False})
    seen.clear()
    lorax.train(plain, callbacks=[look])
    assert set(seen) == {0}


def fast_modules(model):
    return sum(bool({"forward", "project"} & set(vars(m))) for m in model.modules())


@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
def test_nothing_of_a_whole_step_stays_alive(tmp_path, quantization):
    """Without the collector: no reference cycle holds what a step made (issue 12: 4.9 GB once)."""
    llama(hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path / "base")
    model = lorax.load_model(tmp_path / "base", quantization=quantization)
    lorax.add_adapter(model, lorax.LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    model.train()
    ids = tokens(rows=2, length=40)

    def step():
        with accelerated(model):
            summed_loss(model, ids, ids).backward()
        model.zero_grad()

    def alive():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            step()
        assert alive() == before
    finally:
        gc.enable()
