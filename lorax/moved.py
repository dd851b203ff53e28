"""Modules that moved in version 0.1: their old paths import for this version, and say so.

`import lorax.quant.nf4` gives a module that warns (DeprecationWarning) and whose names are those of
the module or modules that it became. lorax's own files never use it.
"""

import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, cast

MOVED: dict[str, tuple[str, ...]] = {
    "adapters.adalora_config": ("adapters.adalora.config",),
    "adapters.algebra": ("adapters.arithmetic",),
    "adapters.initialize": ("adapters.lora", "adapters.pissa", "adapters.loftq"),
    "adapters.prompt_config": ("adapters.prompt.config",),
    "adapters.rank_allocator": ("adapters.adalora.allocator",),
    "adapters.replaced": ("adapters.modules_to_save",),
    "adapters.residual": ("merging.residual",),
    "adapters.routes": ("merging.routes",),
    "adapters.started": ("adapters.pissa", "adapters.loftq"),
    "adapters.tokens": ("adapters.trainable_tokens",),
    "formats.merged_model": ("merging.files",),
    "models.prefix": ("models.model",),
    "quant.bitsandbytes_layout": ("quant.state_dict",),
    "quant.formats": ("quant.quantize", "quant.state_dict"),
    "quant.llm_int8": ("quant.int8",),
    "quant.nf4": ("quant.four_bit",),
    "verify": ("parity.against_peft",),
    "verify.adapter": ("inspect.adapter",),
    "verify.against_peft": ("parity.against_peft",),
    "verify.causes": ("parity.causes",),
    "verify.compare": ("parity.compare",),
    "verify.difference": ("parity.difference",),
    "verify.merge_costs": ("merging.costs",),
    "verify.merge_report": ("merging.report",),
    "verify.merging": ("merging.laboratory",),
    "verify.optimizer": ("inspect.optimizer",),
    "verify.quantization": ("inspect.quantization",),
    "verify.report": ("parity.report",),
    "verify.sides": ("parity.sides",),
}
RENAMED = {"quant.formats.from_state_dict": ("quant.state_dict", "read")}


class MovedModule(ModuleType):
    """An old path: each name is looked up where it lies now."""

    def __getattr__(self, name: str) -> Any:
        mine = self.__name__.removeprefix("lorax.")
        if f"{mine}.{name}" in RENAMED:
            now, name = RENAMED[f"{mine}.{name}"]
            return getattr(import_module(f"lorax.{now}"), name)
        for now in MOVED[mine] if not name.startswith("__") else ():
            if hasattr(import_module(f"lorax.{now}"), name):
                return getattr(import_module(f"lorax.{now}"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`lorax.verify(adapter)`, also after `import lorax.verify.merging`: it was both."""
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


class Loader:
    """Makes an old path's module; Python's import machinery calls both methods."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        """An empty module, and the warning."""
        now = " and ".join(f"lorax.{each}" for each in MOVED[spec.name.removeprefix("lorax.")])
        text = f"{spec.name} is now {now}; the old name goes with the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return MovedModule(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Nothing: names are looked up when they are asked for."""


def find(name: str) -> ModuleSpec | None:
    """The spec of an old path, such as "lorax.quant.nf4"; None for any other module."""
    if name.removeprefix("lorax.") not in MOVED:
        return None
    return spec_from_loader(name, cast(Any, Loader), is_package=name == "lorax.verify")
