"""The GPU's training step on a CPU, through its kernels' twins; and gradients by name."""

import torch
from peft_pairs import trained

from lorax.kernels import reference_step
from lorax.training.fast import install
from lorax.training.fast.install import accelerated
from lorax.training.gpu import known
from lorax.training.loss import summed_loss

GLOBAL_BOUND, WORST_BOUND = 1e-5, 3e-4  # of the gradients' norm; of one tensor's


def through_twins(monkeypatch):
    """Layers are taken, and computed by the kernels' twins."""
    monkeypatch.setattr(known, "kernels_for_step", lambda x: reference_step)


def counted(monkeypatch):
    """A list that grows with each layer that the GPU's step computes."""
    taken, real = [], install.run_layer
    monkeypatch.setattr(install, "run_layer", lambda *a: taken.append(a[3]) or real(*a))
    return taken


def mine_of(model, ids, fast=True, labels=None, context=None):
    """The mean loss, and each gradient by its name."""
    labels = ids if labels is None else labels
    model.zero_grad()
    with accelerated(model, fast):
        loss = summed_loss(model, ids, labels, context) / (labels[:, 1:] != -100).sum()
        loss.backward()
    return loss.item(), gradients(model)


def theirs_of(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model):
    found = {name: p.grad for name, p in trained(model).items()}
    return {name: g.float().clone() for name, g in found.items() if g is not None}


def assert_close(mine, theirs):
    (loss, found), (expected_loss, expected) = mine, theirs
    assert abs(loss - expected_loss) / expected_loss < GLOBAL_BOUND
    assert set(found) == set(expected)
    squares = sum((found[n] - e).square().sum() for n, e in expected.items())
    total = sum(e.square().sum() for e in expected.values())
    assert (squares / total).sqrt() < GLOBAL_BOUND
    worst = {n: ((found[n] - e).norm() / e.norm()).item() for n, e in expected.items()}
    assert max(worst.values()) < WORST_BOUND, max(worst, key=worst.get)


def quantized(model, format="nf4-dq"):
    """The model with its layers' Linears in four bits."""
    from lorax.quant.linear import QuantizedLinear
    from lorax.quant.quantize import quantize

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            weight = quantize(module.weight.detach(), format)
            setattr(parent, name.rpartition(".")[2], QuantizedLinear(weight, module.bias))
    return model
