"""Which modules a LoRAConfig adapts: target_modules written out, and the modules found."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.fit import LONG, is_linear, missing_targets, shortest_names
from lorax.adapters.tables import head_path
from lorax.errors import AdapterError
from lorax.models.model import Model


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
            "no module is left to adapt: exclude_modules or layers_to_transform take them all out"
        )
    for name, module in targets.items():
        if not is_linear(module) and not isinstance(module, nn.Embedding):
            kind = type(module).__name__
            raise AdapterError(
                f"target_modules: {name} is a {kind}; lorax adapts Linears and Embeddings"
            )
    return targets
