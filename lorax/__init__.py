"""lorax: LoRA and QLoRA from scratch in PyTorch and Triton.

Importing lorax starts nothing: each public name below is imported from its room the first time it
is used, so that `lorax --help` answers at once. Type checkers read the same in __init__.pyi.
"""

import sys
from importlib import import_module
from typing import Any

from lorax.version import __version__ as __version__

_NAMES = {  # module: its public names
    "adapters.adalora.allocator": "RankAllocator fold_into_lora",
    "adapters.adalora.config": "AdaLoRAConfig",
    "adapters.arithmetic": "Adapter",
    "adapters.config": "LoRAConfig",
    "adapters.convert": "convert_to_lora",
    "adapters.counting": "print_trainable_parameters",
    "adapters.inject": "add_adapter disabled_adapter",
    "adapters.merge": "merge_adapter unload_adapter unmerge_adapter",
    "adapters.prompt.config": "PromptTuningConfig",
    "adapters.variants": "Variant register_variant",
    "errors": "LoraxError",
    "formats.adapter_data": "read_adapter write_adapter",
    "formats.huggingface": "load_model load_tokenizer save_model",
    "formats.peft": "save_adapter",
    "inference.generate": "generate",
    "inference.named": "load_adapter named_adapters use_adapter",
    "models.families": "register_model",
    "parity.against_peft": "verify",
    "plugins": "load_plugin",
    "quant.quantize": "QuantizedTensor quantize",
    "quant.register": "register_codebook",
    "training.hooks": "StepHook register_step_hook",
    "training.loop": "train",
    "training.recipe": "Recipe",
}
_HOME = {name: f"lorax.{module}" for module, names in _NAMES.items() for name in names.split()}
_ROOMS = {
    *("adapters", "data", "errors", "formats", "inference", "inspect", "kernels", "merging"),
    *("models", "optim", "parity", "quant", "training"),
}

__all__ = sorted(_HOME)


class _OldPaths:
    """Last in `sys.meta_path`: asked for a module of lorax's only where no file has its name."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return import_module("lorax.moved").find(name) if name.startswith("lorax.") else None


sys.meta_path.append(_OldPaths())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _ROOMS:
        return import_module(f"lorax.{name}")
    raise AttributeError(f"module 'lorax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
