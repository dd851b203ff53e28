"""The families of models, by the `model_type` of their config.json; torch is not needed to ask.

A family is one entry: its name, transformers' class for it, and where its two classes are. What
they must offer is in config.py and model.py. A researcher's own comes in from their own file:

    lorax.register_model("olmo2", "Olmo2ForCausalLM", config=Olmo2Config, model=Olmo2)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorax.errors import UnsupportedModel, UsageError

if TYPE_CHECKING:
    from lorax.models.config import ModelConfig
    from lorax.models.model import Model


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    model_type: config.json's name for it.
    architecture: transformers' class, for config.json's "architectures".
    config, model: the classes, or "package.module:Class", imported when they are asked for.
    """

    model_type: str
    architecture: str
    config: str | type[ModelConfig]
    model: str | type[Model]

    @property
    def config_class(self) -> type[ModelConfig]:
        """Reads and writes config.json."""
        return _class(self.config)

    @property
    def model_class(self) -> type[Model]:
        """Computes."""
        return _class(self.model)


def _class(named: Any) -> Any:
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(import_module(module), name)


_CONFIGS, _LLAMA = "lorax.models.llama_config", "lorax.models.llama:Llama"
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", f"{_CONFIGS}:LlamaConfig", _LLAMA),
        Family("mistral", "MistralForCausalLM", f"{_CONFIGS}:MistralConfig", _LLAMA),
        Family("qwen2", "Qwen2ForCausalLM", f"{_CONFIGS}:Qwen2Config", _LLAMA),
        Family("qwen3", "Qwen3ForCausalLM", f"{_CONFIGS}:Qwen3Config", _LLAMA),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            "lorax.models.gemma2:Gemma2Config",
            "lorax.models.gemma2:Gemma2",
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "lorax.models.gemma3:Gemma3Config",
            "lorax.models.gemma3:Gemma3",
        ),
        Family("phi3", "Phi3ForCausalLM", "lorax.models.phi3:Phi3Config", "lorax.models.phi3:Phi3"),
        Family("gpt2", "GPT2LMHeadModel", "lorax.models.gpt2:GPT2Config", "lorax.models.gpt2:GPT2"),
    )
}


def find_family(model_type: Any, where: str) -> Family:
    """The family of that name.

    Raises:
        UnsupportedModel: there is none; the message lists those that there are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{where}: model_type {model_type!r} is not covered; lorax loads "
            f"{', '.join(FAMILIES)}; choose such a model, or register your own with --plugin FILE"
        )
    return FAMILIES[model_type]


def register_model(
    model_type: str,
    architecture: str,
    *,
    config: str | type[ModelConfig],
    model: str | type[Model],
) -> None:
    """Add a family: its directories load, save, train and merge like the others, in this process.

    Args:
        model_type: of its config.json.
        architecture: transformers' class for it, "Olmo2ForCausalLM".
        config: a `lorax.models.config.ModelConfig`, or "package.module:Class".
        model: a `lorax.models.model.Model`, made of such a config.

    Raises:
        UsageError: no name, or one that another family has. The same again, or the same file loaded
            once more, changes nothing else.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", model_type):
        raise UsageError(
            f"model_type {model_type!r}: expected letters, digits, '_', '-' and '.'; take "
            "another name"
        )
    family = Family(model_type, architecture, config, model)
    there = FAMILIES.get(model_type)
    if there is not None and _names(there) != _names(family):
        raise UsageError(
            f"model_type {model_type!r} is there as {there.architecture}; take another name"
        )
    FAMILIES[model_type] = family


def _names(family: Family) -> list[str]:
    named = (family.config, family.model)
    words = [n.rpartition(":")[2] if isinstance(n, str) else n.__name__ for n in named]
    return [family.architecture, *words]
