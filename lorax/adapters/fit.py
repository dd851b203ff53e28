"""What a config names and a model lacks: an error for a new adapter, a line in the log for a file.

A list of targets may be written for many families ("q_proj", "c_attn", "W_pack"), so PEFT adapts
what it finds. lorax loads such adapters; where one is made, a name without a module is a mistake.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear

log = logging.getLogger("lorax")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear, quantized or not."""
    return isinstance(module, nn.Linear | QuantizedLinear)


def check_fit(model: nn.Module, config: LoRAConfig) -> None:
    """Refuse a config with names that the model lacks.

    Raises:
        AdapterError: the first of them.
    """
    for line in missing_targets(model, config):
        raise AdapterError(line)


def missing_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """A line for each kind of name in target_modules and modules_to_save that matches no module."""
    modules = {name: module for name, module in model.named_modules() if name}
    lines = []
    unmatched = config.unmatched(modules)
    if unmatched:
        linears = sorted({n.rpartition(".")[2] for n, m in modules.items() if is_linear(m)})
        lines.append(
            f"target_modules: {unmatched} match no module; the Linears are called {linears}"
        )
    for wanted in config.modules_to_save or []:
        if not any(name.endswith(wanted) for name in modules):
            lines.append(f"modules_to_save: {wanted!r} matches no module")
    return lines


# A list as long as this PEFT condenses, where it puts an adapter in.
LONG = 20


def shortest_names(targets: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest ends of paths that match these targets and none of the other modules.

    210 paths become ["down_proj", "gate_proj", ...]. By PEFT's rule (0.21.2), in order.
    """
    taken = {end for name in others for end in _ends(name)}
    chosen: set[str] = set()
    for target in sorted(targets, key=_ends):
        if any(target.endswith(f".{end}") for end in chosen):
            continue
        free = [end for end in _ends(target) if end not in taken and end not in chosen]
        chosen.update(free[:1])
    return sorted(chosen or targets)


def _ends(name: str) -> list[str]:
    """A path's ends in whole names, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
