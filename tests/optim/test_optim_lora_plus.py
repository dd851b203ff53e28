"""LoRA+ groups, and the recipe's choice of optimizer."""

import copy

import pytest
import torch
from torch import nn

from lorax.errors import RecipeError, UsageError
from lorax.optim import (
    AdamW,
    AdamW8bit,
    PagedAdamW,
    PagedAdamW8bit,
    lora_plus_groups,
)
from lorax.training.optimizers import build_optimizer, paging_line, set_rates
from lorax.training.recipe import Recipe

KINDS = {
    "adamw": AdamW,
    "adamw-8bit": AdamW8bit,
    "paged-adamw": PagedAdamW,
    "paged-adamw-8bit": PagedAdamW8bit,
}


class Adapted(nn.Module):
    """The parameter names that adapters have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(4, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, 4))
        self.lora_embedding_A = nn.Parameter(torch.randn(4, 8))
        self.lora_embedding_B = nn.Parameter(torch.randn(8, 4))
        self.lora_bias = nn.Parameter(torch.zeros(8))
        self.lora_Bx = nn.Parameter(torch.randn(8, 4))  # not B: the name must match as a whole


def rates(model, groups):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["lr"] for group in groups for p in group["params"]}


def test_b_and_vectors_have_ratio_times_the_rate():
    model = Adapted()
    groups = lora_plus_groups(model, 1e-3, 16.0, weight_decay=0.1)
    assert rates(model, groups) == {
        "lora_A": 1e-3,
        "lora_embedding_A": 1e-3,
        "lora_Bx": 1e-3,
        "lora_B": 16e-3,
        "lora_embedding_B": 16e-3,
        "lora_bias": 16e-3,
    }
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


@pytest.mark.parametrize("kind", KINDS.values())
def test_ratio_1_is_adamw_bit_for_bit(kind):
    plain = Adapted()
    grouped = copy.deepcopy(plain)
    trained = [p for p in plain.parameters() if p.requires_grad]
    one = kind(trained, lr=1e-3, weight_decay=0.1, **small(kind))
    two = kind(lora_plus_groups(grouped, 1e-3, 1.0, 0.1), **small(kind))
    for _ in range(30):
        for p, q in zip(trained, [q for q in grouped.parameters() if q.requires_grad], strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    for p, q in zip(plain.parameters(), grouped.parameters(), strict=True):
        assert torch.equal(p, q)


def small(kind):
    return {"min_8bit_size": 0} if kind in (AdamW8bit, PagedAdamW8bit) else {}


@pytest.mark.parametrize("kind", KINDS.values())
def test_weight_decay_is_decoupled(kind):
    """With zero gradients a parameter shrinks by its rate times the decay; no moment moves."""
    model = Adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kind(lora_plus_groups(model, 1e-2, 10.0, 0.5), **small(kind))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model.lora_A, before["lora_A"] * (1 - 1e-2 * 0.5))
    assert torch.equal(model.lora_embedding_B, before["lora_embedding_B"] * (1 - 1e-1 * 0.5))
    assert torch.equal(model.weight, before["weight"])
    for moment in optimizer.moments(model.lora_A):
        assert (moment == 0).all()


def test_impossible_groups_are_refused():
    for ratio in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="ratio"):
            lora_plus_groups(Adapted(), 1e-3, ratio)
    frozen = Adapted().requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable"):
        lora_plus_groups(frozen, 1e-3, 16.0)


def recipe(**train):
    values = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "train": {"output_dir": "o", "learning_rate": 1e-3, "weight_decay": 0.1, **train},
    }
    return Recipe.from_dict(values)


@pytest.mark.parametrize("name", KINDS)
def test_recipes_choose_by_name(name):
    settings = recipe(optimizer=name, adam_beta2=0.99, lora_plus_ratio=4.0).train
    model = Adapted()
    optimizer = build_optimizer(model, settings)
    assert type(optimizer) is KINDS[name]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert rates(model, optimizer.param_groups)["lora_B"] == 4e-3
    set_rates(optimizer, [group["lr"] for group in optimizer.param_groups], 0.5)
    assert rates(model, optimizer.param_groups)["lora_B"] == 2e-3
    assert rates(model, optimizer.param_groups)["lora_A"] == 0.5e-3
    assert paging_line(optimizer) == {}  # nothing is paged on a CPU


def test_a_recipe_without_ratio_has_one_rate():
    optimizer = build_optimizer(Adapted(), recipe().train)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_unknown_optimizers_and_ratios_are_refused():
    with pytest.raises(RecipeError, match=r"train\.optimizer"):
        recipe(optimizer="adam")
    with pytest.raises(RecipeError, match=r"train\.lora_plus_ratio"):
        recipe(lora_plus_ratio=0.0)
