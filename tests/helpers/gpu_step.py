"""The GPU's training step on a CPU, through its kernels' twins."""

import torch

from lorax.kernels import reference_step
from lorax.training.fast import install
from lorax.training.gpu import known


def through_twins(monkeypatch):
    """Layers are taken, and computed by the kernels' twins."""
    monkeypatch.setattr(known, "kernels_for_step", lambda x: reference_step)


def counted(monkeypatch):
    """A list that grows with each layer that the GPU's step computes."""
    taken, real = [], install.run_layer
    monkeypatch.setattr(install, "run_layer", lambda *a: taken.append(a[3]) or real(*a))
    return taken


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
