"""lorax: LoRA and QLoRA from scratch in PyTorch and Triton.

Importing lorax starts nothing: each public name below is imported from its room the first time it
is used, so that `lorax --help` answers at once and nobody pays for torch who does not need it.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorax.version import __version__ as __version__

if TYPE_CHECKING:
    from lorax.adapters.adalora.allocator import RankAllocator as RankAllocator
    from lorax.adapters.adalora.allocator import fold_into_lora as fold_into_lora
    from lorax.adapters.adalora.config import AdaLoRAConfig as AdaLoRAConfig
    from lorax.adapters.arithmetic import Adapter as Adapter
    from lorax.adapters.config import LoRAConfig as LoRAConfig
    from lorax.adapters.convert import convert_to_lora as convert_to_lora
    from lorax.adapters.counting import print_trainable_parameters as print_trainable_parameters
    from lorax.adapters.inject import add_adapter as add_adapter
    from lorax.adapters.inject import disabled_adapter as disabled_adapter
    from lorax.adapters.merge import merge_adapter as merge_adapter
    from lorax.adapters.merge import unload_adapter as unload_adapter
    from lorax.adapters.merge import unmerge_adapter as unmerge_adapter
    from lorax.adapters.prompt.config import PromptTuningConfig as PromptTuningConfig
    from lorax.adapters.variants import Variant as Variant
    from lorax.adapters.variants import register_variant as register_variant
    from lorax.errors import LoraxError as LoraxError
    from lorax.formats.adapter_data import read_adapter as read_adapter
    from lorax.formats.adapter_data import write_adapter as write_adapter
    from lorax.formats.huggingface import load_model as load_model
    from lorax.formats.huggingface import load_tokenizer as load_tokenizer
    from lorax.formats.huggingface import save_model as save_model
    from lorax.formats.peft import load_adapter as load_adapter
    from lorax.formats.peft import save_adapter as save_adapter
    from lorax.inference.generate import generate as generate
    from lorax.models.families import register_model as register_model
    from lorax.parity.against_peft import verify as verify
    from lorax.plugins import load_plugin as load_plugin
    from lorax.quant.quantize import quantize as quantize
    from lorax.quant.register import register_codebook as register_codebook
    from lorax.quant.tensor import QuantizedTensor as QuantizedTensor
    from lorax.training.hooks import StepHook as StepHook
    from lorax.training.hooks import register_step_hook as register_step_hook
    from lorax.training.loop import train as train
    from lorax.training.recipe import Recipe as Recipe

_HOME = {
    "AdaLoRAConfig": "lorax.adapters.adalora.config",
    "Adapter": "lorax.adapters.arithmetic",
    "LoRAConfig": "lorax.adapters.config",
    "LoraxError": "lorax.errors",
    "PromptTuningConfig": "lorax.adapters.prompt.config",
    "QuantizedTensor": "lorax.quant.quantize",
    "RankAllocator": "lorax.adapters.adalora.allocator",
    "Recipe": "lorax.training.recipe",
    "StepHook": "lorax.training.hooks",
    "Variant": "lorax.adapters.variants",
    "add_adapter": "lorax.adapters.inject",
    "convert_to_lora": "lorax.adapters.convert",
    "disabled_adapter": "lorax.adapters.inject",
    "fold_into_lora": "lorax.adapters.adalora.allocator",
    "generate": "lorax.inference.generate",
    "load_adapter": "lorax.formats.peft",
    "load_model": "lorax.formats.huggingface",
    "load_plugin": "lorax.plugins",
    "load_tokenizer": "lorax.formats.huggingface",
    "merge_adapter": "lorax.adapters.merge",
    "print_trainable_parameters": "lorax.adapters.counting",
    "quantize": "lorax.quant.quantize",
    "read_adapter": "lorax.formats.adapter_data",
    "register_codebook": "lorax.quant.register",
    "register_step_hook": "lorax.training.hooks",
    "register_variant": "lorax.adapters.variants",
    "register_model": "lorax.models.families",
    "save_adapter": "lorax.formats.peft",
    "save_model": "lorax.formats.huggingface",
    "train": "lorax.training.loop",
    "unload_adapter": "lorax.adapters.merge",
    "unmerge_adapter": "lorax.adapters.merge",
    "verify": "lorax.parity.against_peft",
    "write_adapter": "lorax.formats.adapter_data",
}

_ROOMS = {
    "adapters", "data", "errors", "formats", "inference", "inspect", "kernels",
    "merging", "models", "optim", "parity", "quant", "training",
}  # fmt: skip

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
