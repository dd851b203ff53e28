"""AdaLoRA against the installed PEFT: files, logits, gradients, twenty steps, ranks that change."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import gpt2, llama, tokens
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft_pairs import config_as_read
from safetensors.torch import load_file
from tiny_runs import folder as folder
from tiny_runs import recipe
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.adalora.allocator import RankAllocator, fold_into_lora
from lorax.adapters.adalora.layer import AdaLoRALinear
from lorax.adapters.attached import adapter_layers
from lorax.adapters.stated import adapter_config
from lorax.errors import AdapterError, FormatError, RecipeError
from lorax.models.llama import Llama
from lorax.models.llama_config import LlamaConfig
from lorax.training.loss import summed_loss

FLOAT32 = 1e-5
STEPS = {"total_step": 20}
# name -> (base, config, whether some ranks are lost)
CASES = {
    "all ranks": (llama, {"target_modules": ["q_proj", "v_proj"]}, False),
    "default targets": (llama, {}, True),
    "pruned": (llama, {"target_modules": "all-linear", "init_r": 4, "lora_alpha": 5}, True),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"], "init_r": 3}, True),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "init_r": 5}, True),
    "gpt2 all ranks": (gpt2, {}, False),
}


def peft_adalora(base, config, pruned, **more):
    """PEFT's AdaLoRA on a copy of `base`, random, with ranks lost as its allocator loses them."""
    settings = AdaLoraConfig(task_type="CAUSAL_LM", **{**STEPS, **config, **more})
    model = get_peft_model(copy.deepcopy(base), settings).eval()
    pattern = {}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            if "lora_E" in name:
                keep = torch.rand(len(parameter), generator=generator) < 0.4
                if not pattern:
                    keep[:] = False  # a layer without any rank
                pattern[name] = keep.tolist()
                if pruned:
                    parameter[~keep] = 0.0
    if pruned:
        model.peft_config["default"].rank_pattern = pattern
    return model


@pytest.fixture
def pair(request, tmp_path):
    """(PEFT's model, a lorax model of the same base, the folder of PEFT's adapter)"""
    make, config, pruned = CASES[request.param]
    base = make()
    base.save_pretrained(tmp_path / "base")
    theirs = peft_adalora(base, config, pruned)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, lorax.load_model(tmp_path / "base"), tmp_path / "theirs"


all_cases = pytest.mark.parametrize("pair", CASES, indirect=True)


def largest_difference(mine, theirs):
    with torch.no_grad():
        return (mine(tokens()) - theirs(tokens()).logits).abs().max().item()


@all_cases
def test_an_adapter_of_peft_loads(pair):
    theirs, mine, path = pair
    with torch.no_grad():
        before = mine(tokens())
    lorax.load_adapter(mine, path)
    assert largest_difference(mine, theirs) <= FLOAT32
    assert largest_difference(lambda _: before, theirs) > 0.1
    with lorax.disabled_adapter(mine), torch.no_grad():
        assert torch.equal(mine(tokens()), before)


@all_cases
def test_bytes_and_config_survive_and_peft_loads_ours(pair, tmp_path):
    theirs, mine, path = pair
    lorax.load_adapter(mine, path)
    lorax.save_adapter(mine, tmp_path / "mine")
    one, two = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "mine"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name
    assert config_as_read(tmp_path / "mine") == config_as_read(path)
    base = copy.deepcopy(theirs.unload())
    again = PeftModel.from_pretrained(base, tmp_path / "mine").eval()
    assert largest_difference(mine, again) <= FLOAT32


@all_cases
def test_gradients_against_peft(pair):
    theirs, mine, path = pair
    theirs = PeftModel.from_pretrained(theirs.unload(), path, is_trainable=True).eval()
    lorax.load_adapter(mine, path, trainable=True)
    for logits in (mine(tokens()), theirs(tokens()).logits):
        logits.log_softmax(-1)[..., 5].mean().backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if "lora_" in name and p.numel()
    }
    found = {n: p.grad for n, p in mine.named_parameters() if p.requires_grad and p.numel()}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-5, name


def loaded(tmp_path, quantization=None, dtype="float32", case="pruned"):
    make, config, pruned = CASES[case]
    base = make()
    base.save_pretrained(tmp_path / "base")
    peft_adalora(base, config, pruned).save_pretrained(tmp_path / "adapter")
    model = lorax.load_model(tmp_path / "base", dtype, quantization=quantization)
    lorax.load_adapter(model, tmp_path / "adapter", trainable=True)
    return model


def relative_rms(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("quantization", "bound"), [(None, 2e-6), ("nf4-dq", 1e-5)])
def test_merging_loses_nothing(quantization, bound, tmp_path):
    """R13, rank 0 among the layers; unmerging gives the base's bits back."""
    model = loaded(tmp_path, quantization)
    with torch.no_grad():
        before = model(tokens())
        lorax.merge_adapter(model)
        assert relative_rms(model(tokens()), before) <= bound
        lorax.unmerge_adapter(model)
        assert torch.equal(model(tokens()), before)
        lorax.unload_adapter(model, merge=True)
        assert relative_rms(model(tokens()), before) <= bound
    assert not any(isinstance(m, AdaLoRALinear) for m in model.modules())


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq", "int8-symmetric"])
def test_over_a_quantized_base_it_is_adalora_over_the_dequantized_one(quantization, tmp_path):
    """Logits and gradients by name, against the same adapter over plain dequantized weights."""
    model = loaded(tmp_path, quantization)
    plain = copy.deepcopy(model)
    for layer in adapter_layers(plain).values():
        layer.base_layer = layer.dense_base()
    for one in (model, plain):
        one(tokens()).log_softmax(-1)[..., 5].mean().backward()
    with torch.no_grad():
        assert (model(tokens()) - plain(tokens())).abs().max() <= FLOAT32
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad and p.numel()}
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert relative_rms(parameter.grad, gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("change", [{"quantization": "int8"}, {"dtype": "bfloat16"}])
def test_it_computes_and_learns_over_int8_and_bfloat16(change, tmp_path):
    model = loaded(tmp_path, **change)
    loss = summed_loss(model, tokens(), tokens())
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()
    names = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("lora_E" in name for name in names)


def test_a_rank_is_a_row_a_value_and_a_column():
    """The layer's output against the sum over its ranks, one by one; and after pruning."""
    base = torch.nn.Linear(7, 5).requires_grad_(False)
    layer = AdaLoRALinear(base, 3, 0.7)
    layer.initialize(False)
    x = torch.randn(4, 7)
    A, B, E = layer.lora_A, layer.lora_B, layer.lora_E
    ranks = [0.7 * E[i, 0] * (x @ A[i])[:, None] * B[:, i] for i in range(3)]
    with torch.no_grad():
        assert torch.allclose(layer(x), base(x) + sum(ranks), atol=1e-5)
        layer.prune([True, False, True])
        assert torch.allclose(layer(x), base(x) + ranks[0] + ranks[2], atol=1e-5)
        layer.prune([False, False])
        assert torch.equal(layer(x), base(x))
    assert (layer.r, layer.lora_B.shape) == (0, (5, 0))


# --- the allocator ---------------------------------------------------------------------------


def batches(vocabulary):
    generator = torch.Generator().manual_seed(5)
    for step in range(20):
        ids = tokens(4, 24, vocabulary, seed=100 + step)
        labels = ids.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        yield ids, labels


def optimizer_for(model):
    # eps 1e-5 as in test_training_against_peft.py: with 1e-8 a gradient of rounding noise is blown
    # up to a full step.
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-3, eps=1e-5, weight_decay=0.01)


def train_theirs(model):
    """Losses (the penalty included) and masks of each step, and the weights after all."""
    optimizer, losses, masks = optimizer_for(model), [], []
    model.train()
    for step, (ids, labels) in enumerate(batches(model.config.vocab_size), 1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        pattern = model.peft_config["default"].rank_pattern
        masks.append(pattern and {n.removesuffix(".default"): list(m) for n, m in pattern.items()})
    weights = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.detach()
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    return losses, masks, weights


def train_ours(model):
    """The same in lorax: two micro-batches and the penalty once, and only then `finish`."""
    optimizer, losses, masks = optimizer_for(model), [], []
    allocator = RankAllocator(model)
    model.train()
    for ids, labels in batches(model.config.vocab_size):
        count = (labels[:, 1:] != -100).sum()
        total = 0.0
        for part in (slice(0, 1), slice(1, 4)):
            loss = summed_loss(model, ids[part], labels[part]) / count
            loss.backward()
            total += loss.item()
        penalty = allocator.penalty()
        penalty.backward()
        optimizer.step()
        allocator.update()
        optimizer.zero_grad()
        losses.append(total + penalty.item())
        found = allocator.masks
        masks.append(found and {f"{name}.lora_E": mask for name, mask in found.items()})
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    allocator.finish()
    return losses, masks, weights


RUNS = {
    "llama": (llama, {"target_modules": "all-linear", "init_r": 4, "target_r": 1}, {}),
    "llama by fives": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "init_r": 6, "target_r": 2},
        {"tinit": 3, "tfinal": 4, "deltaT": 5, "beta1": 0.7, "orth_reg_weight": 0.1},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "init_r": 5}, {"tinit": 2, "tfinal": 6}),
}


@pytest.mark.parametrize("case", RUNS)
def test_twenty_steps_against_peft(case, tmp_path):
    make, config, schedule = RUNS[case]
    base = make()
    base.save_pretrained(tmp_path / "base")
    settings = {"target_r": 2, **config, **schedule, "init_lora_weights": False}
    theirs = peft_adalora(base, settings, pruned=False)
    theirs.save_pretrained(tmp_path / "start")
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "start", trainable=True)
    compare_runs(theirs, mine, tmp_path)


def largest_relative(one, other):
    """Over the tensors by name; where a layer has lost all ranks its E is zero on both sides."""
    assert all(one[name].norm() == 0 for name, t in other.items() if t.norm() == 0)
    return max(relative_rms(one[name], t) for name, t in other.items() if t.norm() > 0)


def compare_runs(theirs, mine, tmp_path, logits=FLOAT32):
    """Ranks and masks equal at each step; losses within 1e-5, weights within the task's noise.

    The noise is PEFT's own spread between two ways to compute the same attention, as in
    test_training_against_peft.py; bound: four times that, or 1e-5 relative in the norm.
    """
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    theirs.set_attn_implementation("sdpa")
    expected_losses, expected_masks, expected_weights = train_theirs(theirs)
    losses, masks, weights = train_ours(mine)
    assert masks == expected_masks
    assert masks[-1] is not None
    assert len({json.dumps(mask) for mask in masks}) >= 3  # they did change on the way
    for ours, others in zip(losses, expected_losses, strict=True):
        assert abs(ours - others) <= 1e-5 * abs(others)
    error = largest_relative(weights, expected_weights)
    if error > 1e-5:
        noise = largest_relative(train_theirs(eager)[2], expected_weights)
        print(f"weights differ by {error:.1e}; PEFT's two attentions by {noise:.1e}")
        assert error <= 4 * noise
    assert len({sum(mask) for mask in masks[-1].values()}) > 1
    lorax.save_adapter(mine, tmp_path / "trained")
    theirs.save_pretrained(tmp_path / "theirs")
    one, two = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("trained", "theirs")
    )
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == masks[-1]
    again = PeftModel.from_pretrained(theirs.unload(), tmp_path / "trained").eval()
    mine.eval()
    assert largest_difference(mine, again) <= logits


@pytest.mark.nightly
def test_twenty_steps_of_smollm2(smollm2_gguf, tmp_path):
    folder, file = smollm2_gguf.rsplit("/", 1)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    torch.manual_seed(0)
    settings = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_r=6, target_r=2,
        tinit=2, tfinal=4, deltaT=3, **STEPS,
    )  # fmt: skip
    theirs = get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path / "start")
    mine = lorax.load_model(smollm2_gguf)
    lorax.load_adapter(mine, tmp_path / "start", trainable=True)
    compare_runs(theirs, mine, tmp_path, logits=1e-4)  # of size 30; as in test_models.py


@given(st.data())
def test_the_budget_is_peft_s_and_falls_to_its_target(data):
    from peft.tuners.adalora.layer import RankAllocator as Theirs

    total = data.draw(st.integers(2, 400))
    tfinal = data.draw(st.integers(0, total - 1))
    tinit = data.draw(st.integers(0, total - tfinal - 1))
    first = data.draw(st.integers(2, 64))
    target = data.draw(st.integers(1, first - 1))
    layers = data.draw(st.integers(1, 200))
    settings = {"total_step": total, "tinit": tinit, "tfinal": tfinal}
    config = lorax.AdaLoRAConfig(init_r=first, target_r=target, **settings)
    theirs = Theirs.__new__(Theirs)
    theirs.peft_config = AdaLoraConfig(init_r=first, target_r=target, **settings)
    theirs.init_bgt, theirs.target_bgt = first * layers, target * layers
    budgets = [config.budget(step, layers) for step in range(1, total + 1)]
    assert budgets == [theirs.budget_schedule(step)[0] for step in range(1, total + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == config.budget(config.last_allocation, layers) == target * layers


def fresh(**settings):
    """A tiny lorax model with an AdaLoRA that trains; 12 layers."""
    torch.manual_seed(0)
    config = {"target_modules": ["q_proj", "v_proj", "up_proj"], "init_r": 4, "target_r": 1}
    base = llama()
    model = Llama(LlamaConfig.read(base.config.to_dict(), ""))
    model.load_state_dict(base.state_dict())
    lorax.add_adapter(model, lorax.AdaLoRAConfig(**{**config, **STEPS, **settings}))
    return model


def drive(model, steps):
    allocator, optimizer = RankAllocator(model), optimizer_for(model)
    history = []
    for ids, labels in list(batches(97))[:steps]:
        (summed_loss(model, ids, labels) / 50 + allocator.penalty()).backward()
        optimizer.step()
        allocator.update()
        optimizer.zero_grad()
        history.append(sum(allocator.ranks.values()))
    return allocator, history


@pytest.mark.parametrize("settings", [{}, {"tinit": 5}, {"tfinal": 19 - 2}, {"deltaT": 100}])
def test_the_ranks_settle_whatever_the_schedule(settings):
    """Even where no multiple of deltaT lies between tinit and tfinal."""
    model = fresh(**settings)
    assert sum(layer.r for layer in adapter_layers(model).values()) == 36
    allocator, history = drive(model, 20)
    assert history[-1] == 9
    assert history == sorted(history, reverse=True)
    allocator.finish()
    ranks = [layer.r for layer in adapter_layers(model).values()]
    assert sum(ranks) == 9
    assert min(ranks) < max(ranks)
    assert adapter_config(model).rank_pattern is not None


def test_what_is_lost_stays_lost_in_the_last_phase():
    model = fresh(tfinal=8)
    allocator, _ = drive(model, 20)
    for name, layer in adapter_layers(model).items():
        kept = torch.tensor(allocator.masks[name])
        assert (layer.lora_E[~kept] == 0).all()
        assert (layer.lora_E[kept] != 0).all()


def test_finish_changes_no_number():
    model = fresh()
    allocator, _ = drive(model, 20)
    with torch.no_grad():
        before = model(tokens())
        allocator.finish()
        assert (model(tokens()) - before).abs().max() <= FLOAT32
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_saved_on_the_way_it_is_whole(tmp_path):
    """Before the ranks are settled all of them are written, the lost ones as zeros."""
    model = fresh()
    drive(model, 10)
    lorax.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(llama_again(), tmp_path).eval()
    assert largest_difference(model.eval(), theirs) <= FLOAT32
    assert json.loads((tmp_path / "adapter_config.json").read_text()).get("rank_pattern") is None


def llama_again():
    torch.manual_seed(0)
    return llama()


def test_the_allocator_refuses_to_be_driven_wrongly():
    model = fresh()
    allocator = RankAllocator(model)
    with pytest.raises(AdapterError, match="settle after step 20, but update"):
        allocator.finish()
    allocator.penalty().backward()
    with pytest.raises(AdapterError, match=r"lora_E has no gradient; call update\(\) between"):
        allocator.update()
    allocator, _ = drive(model, 20)
    allocator.finish()
    with pytest.raises(AdapterError, match="settled"):
        RankAllocator(model)
    lorax.unload_adapter(model)
    lorax.add_adapter(model, lorax.LoRAConfig())
    with pytest.raises(AdapterError, match="LORA; expected ADALORA"):
        RankAllocator(model)


@pytest.mark.parametrize("settings", [{"target_r": 4}, {"target_r": 5}, {"tfinal": 19}])
def test_ranks_that_would_never_change_are_refused(settings):
    with pytest.raises(AdapterError, match=r"never change|before one was watched"):
        RankAllocator(fresh(**settings))


# --- as plain LoRA ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["pruned", "all ranks", "gpt2"])
def test_folded_into_plain_lora_it_computes_the_same(case, tmp_path):
    model = loaded(tmp_path, case=case)
    with torch.no_grad():
        before = model(tokens())
        fold_into_lora(model)
        assert (model(tokens()) - before).abs().max() <= FLOAT32
    lorax.save_adapter(model, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "plain").eval()
    assert largest_difference(lambda _: before, theirs) <= FLOAT32


def test_the_algebra_asks_for_the_folded_form(tmp_path):
    model = loaded(tmp_path)
    for take in (lambda: lorax.Adapter.of(model), lambda: lorax.read_adapter(tmp_path / "adapter")):
        with pytest.raises(AdapterError, match=r"ADALORA; expected LORA, which fold_into_lora"):
            take()
    fold_into_lora(model)
    assert lorax.Adapter.of(model).layers


def test_what_has_no_rank_cannot_be_folded():
    model = fresh()
    with pytest.raises(AdapterError, match="no layer has a rank left"):
        fold_into_lora(model)  # E is zero at first
    lorax.unload_adapter(model)
    lorax.add_adapter(model, lorax.LoRAConfig())
    with pytest.raises(AdapterError, match="no AdaLoRA"):
        fold_into_lora(model)


# --- configs and files -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"total_step": None}, "total_step"),
        ({"total_step": 0}, "total_step"),
        ({"tinit": 12, "tfinal": 8}, "leave none of 20 steps"),
        ({"tinit": -1}, "tinit"),
        ({"deltaT": 0}, "deltaT"),
        ({"init_r": 0}, "init_r"),
        ({"target_r": 0}, "target_r"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": math.nan}, "beta2"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"orth_reg_weight": math.inf}, "orth_reg_weight"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj.lora_E": [True]}}, "12 booleans"),
        ({"rank_pattern": {"q_proj.lora_E": [1] * 12}}, "12 booleans"),
    ],
)
def test_an_impossible_config_is_refused_by_name(values, word):
    with pytest.raises(AdapterError, match=word):
        lorax.AdaLoRAConfig(**{**STEPS, **values})


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"total_step": None}, AdapterError, "total_step"),
        ({"total_step": "many"}, FormatError, "total_step"),
        ({"rank_pattern": [3]}, FormatError, "rank_pattern"),
        ({"rank_pattern": None}, AdapterError, r"lora_A is \(3, 80\)"),
        ({"init_r": 5}, AdapterError, "booleans"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(change, error, word, tmp_path):
    loaded(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = lorax.load_model(tmp_path / "base")
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=word):
        lorax.load_adapter(model, tmp_path / "adapter")
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_an_edited_scale_is_an_error(tmp_path):
    """init_r is in AdaLoRA's scale, and so in the adapter's own fingerprint."""
    model = fresh()
    lorax.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_r": 5}))
    lorax.unload_adapter(model)
    with pytest.raises(AdapterError, match="init_r is 5, was 4"):
        lorax.load_adapter(model, tmp_path)


# --- a run -----------------------------------------------------------------------------------

ADALORA = {"method": "adalora", "init_r": 4, "target_r": 1, "target_modules": "all-linear"}


def adalora_recipe(folder, output, **overrides):
    return recipe(folder, output, adapter=ADALORA, **overrides)


@pytest.mark.parametrize("quantization", [None, "nf4-dq", "int8"])
def test_a_run_deals_out_the_ranks_and_leaves_a_pruned_adapter(quantization, folder, tmp_path):
    overrides = {} if quantization is None else {"model.quantization": quantization}
    run = lorax.train(adalora_recipe(folder, tmp_path / "run", **overrides))
    steps = [line for line in run.metrics if "loss" in line]
    assert all(line["orthogonality"] > 0 for line in steps)
    means = [line["mean_rank"] for line in steps]
    assert means == sorted(means, reverse=True)
    assert means[-1] == 1.0 < means[0]
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[-1] < losses[0]
    tensors = load_file(run.result / "adapter_model.safetensors")
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith("lora_E")]
    assert sum(ranks) == len(ranks) == 21
    assert min(ranks) == 0 < 2 <= max(ranks)
    config = json.loads((run.result / "adapter_config.json").read_text())
    assert config["total_step"] == len(steps)
    model = lorax.load_model(folder / "model", quantization=quantization)
    lorax.load_adapter(model, run.result)
    with torch.no_grad():
        assert torch.equal(model(tokens()), run.model(tokens()))
    if quantization is None:
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, run.result).eval()
        assert largest_difference(run.model, theirs) <= FLOAT32


def test_the_same_recipe_is_the_same_run_and_micro_batches_change_nothing(folder, tmp_path):
    runs = [
        lorax.train(adalora_recipe(folder, tmp_path / name, **{"train.micro_batch_size": size}))
        for name, size in (("a", 3), ("b", 3), ("c", 8))
    ]
    patterns = [adapter_config(run.model).rank_pattern for run in runs]
    assert patterns[0] == patterns[1] == patterns[2]
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in runs]
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_that_is_too_short_for_its_schedule_is_refused(folder, tmp_path):
    with pytest.raises(RecipeError, match="leave none of 8 steps"):
        lorax.train(adalora_recipe(folder, tmp_path / "run", **{"adapter.tinit": 8}))
    assert not (tmp_path / "run").exists()


def test_the_loss_of_the_log_is_the_data_s_alone(folder, tmp_path):
    """The penalty is written beside it; with its weight 0 the first step's loss is the same."""
    runs = [
        lorax.train(adalora_recipe(folder, tmp_path / str(w), **{"adapter.orth_reg_weight": w}))
        for w in (0.0, 0.5)
    ]
    first = [next(line for line in run.metrics if "loss" in line) for run in runs]
    assert first[0]["loss"] == first[1]["loss"]
    assert (first[0]["orthogonality"], first[1]["orthogonality"] > 0) == (0.0, True)


def test_cross_entropy_and_penalty_make_peft_s_loss(tmp_path):
    """One forward pass of PEFT's, whose loss has the penalty in it, against the two of ours."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    theirs = peft_adalora(base, {"target_modules": "all-linear"}, pruned=False)
    theirs.save_pretrained(tmp_path / "adapter")
    mine = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(mine, tmp_path / "adapter", trainable=True)
    ids = tokens()
    data = F.cross_entropy(mine(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    total = (data + RankAllocator(mine).penalty()).item()
    assert total == pytest.approx(theirs(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
