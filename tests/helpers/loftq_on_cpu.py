"""PEFT's LoftQ on a machine without CUDA."""

import importlib.util

import bitsandbytes
import peft
import torch
from peft.utils import loftq_utils


def loftq_on_a_cpu(monkeypatch):
    """PEFT's LoftQ runs on CUDA alone and asks for scipy, which it does not use: lift both."""

    class Stays(torch.Tensor):
        def to(self, *where, **options):
            return super().to(**{key: v for key, v in options.items() if key != "device"})

    def loftq_init(weight, **options):
        found = inner(weight.detach().as_subclass(Stays), **options)
        return tuple(t.as_subclass(torch.Tensor) for t in found)

    inner, move = loftq_utils.loftq_init, bitsandbytes.nn.Params4bit.to
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: True if n == "scipy" else find(n, *a)
    )
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", lambda self, _: move(self, "cpu"))
    monkeypatch.setattr(peft.tuners.lora.layer, "loftq_init", loftq_init)
    return loftq_init
