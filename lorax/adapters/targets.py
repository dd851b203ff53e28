"""Which modules a LoRAConfig adapts: target_modules written out, the modules found, names missed.

A list of targets may be written for many families ("q_proj", "c_attn", "W_pack"), so PEFT adapts
what it finds. lorax loads such adapters; where one is made, a name without a module is a mistake.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.errors import AdapterError
from lorax.models.model import Model
from lorax.quant.linear import QuantizedLinear

LONG = 20  # a list of so many names PEFT condenses, where it puts an adapter in


def is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear, quantized or not."""
    return isinstance(module, nn.Linear | QuantizedLinear)


def head_path(model: nn.Module) -> str | None:
    """The output layer's path; None where the model has none that it names.

    transformers' models are asked, too: PEFT's "all-linear" leaves their heads out.
    """
    if isinstance(model, Model):
        return "lm_head"
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return next((name for name, module in model.named_modules() if module is head), None)


def expand_targets(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Write out target_modules as PEFT does: by the model's kind, by its Linears, in short.

    None takes what is usual for the model, "all-linear" all Linears but a language model's head. A
    list of 20 paths or more is condensed to the shortest names that match the same modules.

    Raises:
        AdapterError: None, for a module or a family of which PEFT has no default.
    """
    targets = config.target_modules
    names = [name for name, _ in model.named_modules()]
    if targets is None:
        usual = model.default_targets if isinstance(model, Model) else None
        if usual is None:
            raise AdapterError(
                f"target_modules is not given, and what is usual for a {type(model).__name__} is "
                "not known; give names or 'all-linear'"
            )
        targets = list(usual)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        head = head_path(model)
        targets = [n for n, m in model.named_modules() if is_linear(m) and n != head]
    if isinstance(targets, list) and len(set(targets)) >= LONG:
        from lorax.adapters.short_names import shortest_names

        ends = tuple(f".{name}" for name in targets)
        others = [n for n in names if n not in set(targets) and not n.endswith(ends)]
        short = shortest_names(set(targets), others)
        targets = short if len(short) < len(set(targets)) else targets
    return config if targets is config.target_modules else replace(config, target_modules=targets)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that `add_adapter` would adapt, by their paths.

    Raises:
        AdapterError: there is none, or one is neither Linear nor Embedding.
    """
    config = expand_targets(model, config)
    modules = {name: module for name, module in model.named_modules() if name}
    targets = {name: module for name, module in modules.items() if config.selects(name)}
    if not targets:
        for line in missing_targets(model, config):
            raise AdapterError(line)
        raise AdapterError(
            "no module is left to adapt: exclude_modules or layers_to_transform take them all out; "
            "leave one of them out, or name fewer modules there"
        )
    for name, module in targets.items():
        if not is_linear(module) and not isinstance(module, nn.Embedding):
            kind = type(module).__name__
            raise AdapterError(
                f"target_modules: {name} is a {kind}; lorax adapts Linears and Embeddings; leave "
                "it out, or train it as a whole by modules_to_save"
            )
    return targets


def missing_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """A line for each kind of name in target_modules and modules_to_save that matches no module."""
    modules = {name: module for name, module in model.named_modules() if name}
    lines = []
    unmatched = config.unmatched(modules)
    if unmatched:
        linears = sorted({n.rpartition(".")[2] for n, m in modules.items() if is_linear(m)})
        lines.append(
            f"target_modules: {unmatched} match no module; the Linears are called {linears}; take "
            "their names, or 'all-linear'"
        )
    for wanted in config.modules_to_save or []:
        if not any(name.endswith(wanted) for name in modules):
            lines.append(f"modules_to_save: {wanted!r} matches no module; mend the name")
    return lines
