"""`accelerated`: the fast path for as long as a run lasts, put on from outside.

Modules of exactly these classes get a method of their own, which asks at each call whether the fast
path takes them as they are now, and else calls the plain one:

    LoRALinear        projections.py
    LlamaMLP          mlp.py
    LlamaAttention    projections.py for q, k and v together
    the model         head.py, which the loss asks for

An instance's method goes before its class's, so nothing of the model has to know. A copy of the
model has methods that are bound to the copy, and a pickled one has the plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.models.llama import LlamaAttention, LlamaMLP
from lorax.training.fast.head import fast_head_loss
from lorax.training.fast.mlp import swiglu_mlp
from lorax.training.fast.parts import Part, part_of, takes
from lorax.training.fast.projections import project


@contextmanager
def accelerated(model: Any, on: bool = True) -> Iterator[None]:
    """The fast path inside, where a module is known to it; on = False changes nothing.

    model: with its adapter, on any device: tensors that are not on a CPU go the plain way. Modules
        that are put in later stay plain.
    """
    known = [m for m in model.modules() if on and type(m) in _METHODS]
    for module in known:
        name, method = _METHODS[type(module)]
        setattr(module, name, MethodType(method, module))
    if on:
        model.head_loss = fast_head_loss
    try:
        yield
    finally:
        if on:
            del model.head_loss
        for module in known:
            delattr(module, _METHODS[type(module)][0])


class _LoRALinear:
    @staticmethod
    def forward(self: LoRALinear, x: Tensor) -> Tensor:
        parts = _parts(x, self)
        return AdapterLayer.forward(self, x) if parts is None else project(x, parts)[0]


class _LlamaMLP:
    @staticmethod
    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        parts = None
        if self.activation is F.silu:
            parts = _parts(x, self.gate_proj, self.up_proj, self.down_proj)
        return LlamaMLP.forward(self, x) if parts is None else swiglu_mlp(x, *parts)


class _LlamaAttention:
    @staticmethod
    def project(self: LlamaAttention, x: Tensor) -> tuple[Tensor, ...]:
        parts = _parts(x, self.q_proj, self.k_proj, self.v_proj)
        return LlamaAttention.project(self, x) if parts is None else project(x, parts)


_METHODS: dict[type[nn.Module], tuple[str, Any]] = {
    LoRALinear: ("forward", _LoRALinear.forward),
    LlamaMLP: ("forward", _LlamaMLP.forward),
    LlamaAttention: ("project", _LlamaAttention.project),
}


def _parts(x: Tensor, *modules: nn.Module) -> list[Part] | None:
    """The modules as parts for that input (..., in); None if one has to compute by itself."""
    if not takes(x):
        return None
    found = []
    for module in modules:
        part = part_of(module, x)
        if part is None:
            return None
        found.append(part)
    return found
