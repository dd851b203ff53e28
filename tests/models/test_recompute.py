"""gradient_checkpointing = "selective" on the plain path: fewer products than true, less kept."""

import pytest
import torch
from oracles import LLAMA_KINDS, gpt2, llama, tokens
from peft_pairs import pair
from torch.utils._python_dispatch import TorchDispatchMode

from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss

POLICIES = (False, "selective", True)
ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Counted(TorchDispatchMode):
    """How many products are computed, and how often a square root of a norm."""

    def __init__(self):
        super().__init__()
        self.products, self.norms = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in PRODUCTS
        self.norms += func is torch.ops.aten.rsqrt.default
        return func(*args, **(kwargs or {}))


def step(model, ids):
    """Loss, gradients, and what the backward computed."""
    model.zero_grad()
    loss = summed_loss(model, ids, ids)
    with Counted() as counted:
        loss.backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), own, counted


BASES = {"llama": llama, "biases": lambda: llama(**LLAMA_KINDS["mlp bias"]), "gpt2": gpt2}


@pytest.mark.parametrize("make", BASES.values(), ids=list(BASES))
def test_each_policy_has_the_same_gradients_to_the_bit(make, tmp_path):
    _, model = pair(make(), tmp_path, trainable=True, **ALL)
    ids, found = tokens(2, 13), {}
    for policy in POLICIES:
        model.gradient_checkpointing = policy
        found[policy] = step(model, ids)
    for policy in ("selective", True):
        assert found[policy][0] == found[False][0]
        for name, gradient in found[False][1].items():
            assert torch.equal(found[policy][1][name], gradient), name
    products = {policy: found[policy][2].products for policy in POLICIES}
    assert products["selective"] == products[False] < products[True]


@pytest.mark.parametrize("make", BASES.values(), ids=list(BASES))
def test_the_hand_written_step_of_a_cpu_under_each_policy(make, tmp_path):
    """Its Functions write into what their products gave: that may not be kept."""
    _, model = pair(make(), tmp_path, trainable=True, **ALL)
    ids, found = tokens(2, 13), {}
    for policy in POLICIES:
        model.gradient_checkpointing = policy
        with accelerated(model):
            found[policy] = step(model, ids)
    for policy in ("selective", True):
        for name, gradient in found[False][1].items():
            assert torch.equal(found[policy][1][name], gradient), name


def test_selective_computes_the_norms_again(tmp_path):
    _, model = pair(llama(), tmp_path, trainable=True, **ALL)
    norms = {}
    for policy in POLICIES:
        model.gradient_checkpointing = policy
        norms[policy] = step(model, tokens(2, 13))[2].norms
    assert norms[False] == 0 < norms["selective"] == norms[True]


@pytest.mark.parametrize("value", [True, False, "selective"])
def test_a_recipe_may_say_each(value):
    from lorax.training.sections import ModelSection

    assert ModelSection(path="base", gradient_checkpointing=value).gradient_checkpointing == value


def test_another_word_is_refused():
    from pydantic import ValidationError

    from lorax.training.sections import ModelSection

    with pytest.raises(ValidationError, match="selective"):
        ModelSection(path="base", gradient_checkpointing="some")
