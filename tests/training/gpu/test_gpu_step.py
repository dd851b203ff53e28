"""The GPU's step over whole models: against PEFT, against the plain path, and where it steps back.

Here its kernels are their twins or run in Triton's interpreter; on a GPU they run as they are.
"""

import copy
from functools import partial
from tempfile import TemporaryDirectory

import pytest
import torch
from gpu_step import counted, quantized, through_twins
from oracles import LLAMA_KINDS, llama, mistral, tokens
from peft_pairs import pair
from step_gradients import assert_close, mine_of, theirs_of

import lorax
from lorax.backend import backend
from lorax.kernels import reference_step
from lorax.models.packed import Documents
from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss

ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
POLICIES = (False, True, "selective")


@pytest.fixture
def taken(monkeypatch):
    through_twins(monkeypatch)
    return counted(monkeypatch)


@pytest.mark.parametrize("kind", LLAMA_KINDS.values(), ids=list(LLAMA_KINDS))
def test_every_kind_of_llama_against_peft(kind, tmp_path, taken):
    theirs, mine = pair(llama(**kind), tmp_path, trainable=True, **ALL)
    ids = tokens(3, 23)
    expected = theirs_of(theirs, ids)
    for policy in POLICIES:
        mine.gradient_checkpointing = policy
        assert_close(mine_of(mine, ids), expected)
    assert len(taken) == 3 * mine.config.num_hidden_layers


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
    "rank 17, a scale that is no power of two": {**ALL, "r": 17, "lora_alpha": 11},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_choice_of_modules_against_peft(config, tmp_path, taken):
    base = llama(mlp_bias=True, attention_bias=True)
    theirs, mine = pair(base, tmp_path, trainable=True, **config)
    ids = tokens(2, 17)
    expected = theirs_of(theirs, ids)
    for policy in POLICIES:
        mine.gradient_checkpointing = policy
        assert_close(mine_of(mine, ids), expected)
    assert len(taken) == 3 * mine.config.num_hidden_layers


def test_a_window_against_peft(tmp_path, taken):
    theirs, mine = pair(mistral(sliding_window=5), tmp_path, trainable=True, **ALL)
    ids = tokens(2, 17)
    assert_close(mine_of(mine, ids), theirs_of(theirs, ids))
    assert taken


SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def small(format=None, seed=0, dropout=0.0, **kind):
    """A Llama of 64 wide with a random adapter, its Linears in `format`."""
    torch.manual_seed(seed)
    with TemporaryDirectory() as where:
        llama(**{**SMALL, **kind}).save_pretrained(where)
        model = lorax.load_model(where)
    model = model if format is None else quantized(model, format)
    lorax.add_adapter(model, lorax.LoRAConfig(**ALL, lora_dropout=dropout))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.mark.parametrize("format", [None, "nf4", "nf4-dq", "fp4-dq", "int8-affine"])
@pytest.mark.parametrize("policy", POLICIES)
def test_each_format_against_the_plain_path(format, policy, taken):
    model, ids = small(format), tokens(2, 19, vocabulary=64)
    model.gradient_checkpointing = policy
    assert_close(mine_of(model, ids), mine_of(model, ids, fast=False))
    assert taken == [policy] * 2


def test_packed_documents_against_the_plain_path(taken):
    model, ids = small("nf4"), tokens(1, 21, vocabulary=64)
    labels = ids.clone()
    labels[0, [0, 8, 11]] = -100
    for policy in POLICIES:
        model.gradient_checkpointing = policy
        run = partial(mine_of, model, ids, labels=labels, context=Documents([8, 3, 10]))
        assert_close(run(), run(fast=False))
    assert taken


@pytest.mark.parametrize("format", [None, "nf4-dq"])
@pytest.mark.parametrize("policy", POLICIES)
def test_through_the_interpreter_against_the_plain_path(format, policy, monkeypatch):
    """The kernels themselves: what no twin can show."""
    taken = counted(monkeypatch)
    model, ids = small(format, num_hidden_layers=1), tokens(1, 9, vocabulary=64)
    model.gradient_checkpointing = policy
    expected = mine_of(model, ids, fast=False)
    with backend("triton"):
        assert_close(mine_of(model, ids), expected)
    assert taken == [policy]


def test_dropout_is_the_same_with_and_without_recomputation(taken):
    model, ids, found = small("nf4", dropout=0.3), tokens(2, 19, vocabulary=64), []
    for policy in POLICIES:
        model.gradient_checkpointing = policy
        torch.manual_seed(5)
        found.append(mine_of(model, ids))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    torch.manual_seed(6)
    other = mine_of(model, ids)
    assert other[0] != found[0][0], "another seed drops others"
    assert taken


def test_dropout_against_the_plain_path_with_the_same_masks(taken, monkeypatch):
    """The plain layers with the masks of the step's seed in the place of F.dropout's."""
    from lorax.adapters.lora import LoRALinear
    from lorax.kernels.drop import Drop
    from lorax.training.gpu import known, seeds

    model, ids = small("nf4", dropout=0.3), tokens(2, 19, vocabulary=64)
    monkeypatch.setattr(seeds, "drawn", lambda: 12345)
    found = mine_of(model, ids)
    sites, seed = {}, torch.tensor([12345])
    for index, layer in enumerate(model.model.layers):
        linears = [module for group in known.linears_of(layer) for module in group]
        sites |= {m: index * known.SITES + site for site, m in enumerate(linears)}

    def dropped(self, x):
        rows = x.reshape(-1, x.shape[-1])
        how = Drop(seed, sites[self], self.dropout)
        return (rows * reference_step.kept(how, *rows.shape) * how.scale).view(x.shape)

    monkeypatch.setattr(LoRALinear, "dropped", dropped)
    assert_close(found, mine_of(model, ids, fast=False))
    assert taken


@pytest.mark.parametrize("policy", POLICIES)
def test_sixteen_bits_are_no_further_from_float32_than_the_plain_path(policy, taken):
    """The mean error of all gradients of four models, within chance."""
    errors = []
    for seed in range(4):
        model = small("nf4", seed)
        half = copy.deepcopy(model).to(torch.bfloat16)
        for name, parameter in half.named_parameters():
            if "lora_" in name:
                parameter.data = model.get_parameter(name).data.clone()
        half.gradient_checkpointing = policy
        wide = copy.deepcopy(half)
        for parameter in wide.parameters():
            parameter.data = parameter.data.float()
        ids = tokens(4, 32, seed=seed, vocabulary=64)
        truth = mine_of(wide, ids, fast=False)[1]
        sides = mine_of(half, ids)[1], mine_of(half, ids, fast=False)[1]
        errors.append([[(s[n] - e).norm() / e.norm() for n, e in truth.items()] for s in sides])
    ours, plain = torch.tensor(errors).mean(2).unbind(1)
    further = ours - plain
    assert further.mean() <= 2 * further.std() / len(further) ** 0.5, (ours, plain)
    assert len(taken) == 8


def test_what_is_kept_shrinks_with_the_policy(taken):
    """Bytes alive between forward and backward, counted by what the Function holds."""
    model, ids = small("nf4"), tokens(2, 32, vocabulary=64)
    held = {}
    for policy in POLICIES:
        model.gradient_checkpointing = policy
        with accelerated(model):
            loss = summed_loss(model, ids, ids)
        held[policy] = kept_bytes(loss)
    assert held[True] < held["selective"] < held[False]
    rows, C = 2 * 32, 64
    x = rows * C * 4
    assert held[True] == 2 * x, "the two layers' inputs alone"


def kept_bytes(loss):
    """What the layers' Functions hold but for factors: their inputs, and `kept`."""
    nodes, seen, total = [loss.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [up for up, _ in node.next_functions]
        if "_LayerBackward" in type(node).__name__:
            tensors = [node.saved_tensors[0], *held_by(node.kept)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            total += sum(storage.nbytes() for storage in storages.values())
    return total


def held_by(kept):
    for half in kept or ():
        for value in vars(half).values():
            yield from value if isinstance(value, list) else [value] if value is not None else []


def test_no_gradient_is_computed_for_the_embedding_and_a_second_backward_is_refused(taken):
    model, ids = small("nf4"), tokens(1, 7, vocabulary=64)
    with accelerated(model):
        loss = summed_loss(model, ids, ids)
        loss.backward()
    assert model.model.embed_tokens.weight.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def watch(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def put_a_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = type(mlp).forward.__get__(mlp)
    mlp.forward.__func__.__module__ = "accelerate.hooks"


def train_a_norm(model):
    model.model.layers[1].input_layernorm.weight.requires_grad_()


def train_a_bias(model):
    linear = model.model.layers[1].mlp.down_proj.base_layer
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))


def switch_off(model):
    model.model.layers[1].self_attn.q_proj.enabled = False


def other_activation(model):
    model.model.layers[1].mlp.activation = torch.nn.functional.gelu


@pytest.mark.parametrize(
    "change", [watch, train_a_norm, train_a_bias, switch_off, other_activation],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_layer_that_is_not_exactly_known_stays_plain(change, taken):
    model, ids = small(), tokens(2, 9, vocabulary=64)
    change(model)
    found = mine_of_all(model, ids)
    assert len(taken) == 1, "the other layer is taken"
    expected = mine_of_all(model, ids, fast=False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 3e-4 * gradient.norm() + 1e-9, name


def mine_of_all(model, ids, fast=True):
    model.zero_grad()
    with accelerated(model, fast):
        summed_loss(model, ids, ids).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_generation_within_a_run_is_the_plain_one(taken):
    model = small("nf4").eval()
    ids = tokens(1, 9, vocabulary=64)
    with accelerated(model), torch.no_grad():
        cache = model.new_cache(1, 20)
        both = torch.cat([model(ids[:, :5], cache), model(ids[:, 5:], cache)], 1)
        assert not taken, "a cache stands before the tokens"
        assert torch.allclose(model(ids), both, atol=1e-5)
    assert len(taken) == 2
