"""An edited model is computed as edited: the fast paths know what they stand for, and look."""

import logging

import pytest
import torch
from oracles import llama, tokens

import lorax
from lorax.adapters import as_known
from lorax.adapters.as_known import is_as_known
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.inference.batch import stream_rows
from lorax.models import rope as rope_file
from lorax.models.llama import LlamaAttention, LlamaLayer, LlamaMLP, LlamaModel, RMSNorm
from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss

KINDS = [RMSNorm, LlamaMLP, LlamaAttention, LlamaModel, LoRALinear]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shipped_is_known(kind):
    """The copies are compared with the code that they are copies of."""
    assert is_as_known(kind)


def doubled(plain):
    return lambda self, *given: 2 * plain(self, *given)


def halved(x, cos, sin):
    P = cos.shape[-1]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin * (P / (P + 1))


CHANGES = {
    "norm": (RMSNorm, "forward", doubled, RMSNorm),
    "mlp": (LlamaMLP, "forward", doubled, LlamaMLP),
    "attention": (LlamaAttention, "forward", doubled, LlamaAttention),
    "projections": (
        LlamaAttention,
        "project",
        lambda plain: lambda self, x: tuple(2 * part for part in plain(self, x)),
        LlamaAttention,
    ),
    "block": (LlamaLayer, "forward", doubled, LlamaModel),
    "layer": (AdapterLayer, "forward", doubled, LoRALinear),
    "lora": (LoRALinear, "path_onto", doubled, LoRALinear),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known") / "base"
    torch.manual_seed(0)
    llama(hidden_size=64, num_attention_heads=4).save_pretrained(folder)
    return folder


def adapted(folder):
    model = lorax.load_model(folder, "float32")
    config = lorax.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    lorax.add_adapter(model, config)
    return model


def results(model):
    """Loss and gradients of the fast step, and what is generated."""
    ids = tokens(rows=2, length=9)
    with accelerated(model):
        loss = summed_loss(model, ids, ids)
        loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    made = stream_rows(model, (), [ids[0].tolist(), ids[1, :4].tolist()], [12, 12])
    return loss.detach(), grads, list(made)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_function_is_computed_as_it_is_written(folder, name, monkeypatch, caplog):
    """Against the plain step, and against generation by whole passes without the fast modules."""
    place, function, change, kind = CHANGES[name]
    model = adapted(folder)
    before = results(model)
    monkeypatch.setattr(as_known, "_SAID", set())
    monkeypatch.setattr(place, function, change(getattr(place, function)))
    with caplog.at_level(logging.WARNING, logger="lorax"):
        assert not is_as_known(kind)
        found = results(model)
    said = [m for m in caplog.messages if "was changed" in m]
    assert said == [f"{place.__name__}.{function} was changed: it is computed as it is written, "
                    "not by the fast path"]  # fmt: skip
    ids = tokens(rows=2, length=9)
    with accelerated(model, on=False):
        plain = summed_loss(model, ids, ids)
        plain.backward()
    torch.testing.assert_close(found[0], plain.detach(), rtol=1e-5, atol=1e-5)
    for mine, parameter in zip(
        found[1], (p for p in model.parameters() if p.grad is not None), strict=True
    ):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-4)
    assert (found[0] - before[0]).abs() > 1e-2
    with torch.no_grad():
        for row, start in ((0, 9), (1, 4)):
            seen = ids[row, :start].tolist()
            for token in (t for index, t in found[2] if index == row and t is not None):
                assert model(torch.tensor([seen]))[0, -1].argmax() == token
                seen.append(token)


def test_changed_rotations_are_seen(monkeypatch):
    monkeypatch.setattr(rope_file, "rotate", halved)
    monkeypatch.setattr(as_known, "_SAID", set())
    assert not is_as_known(LlamaAttention)
    assert is_as_known(LlamaMLP)
