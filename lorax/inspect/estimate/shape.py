"""What a model is made of: its parameters by kind, and what is trained; no weights.

The model is built on torch's meta device, with its adapter, by the code that trains it. So families
and variants of adapters that somebody registered are counted like lorax's own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.counting import count_parameters
from lorax.adapters.inject import add_adapter
from lorax.errors import AdapterError, LoraxError
from lorax.formats.huggingface import quantizable
from lorax.formats.model_config import new_model, undrawn
from lorax.models.config import ModelConfig
from lorax.models.model import Model

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")


@dataclass(frozen=True)
class Shape:
    """A model with what is trained in it.

    parameters: by kind, without the adapter. adapter: sizes of the tensors that an adapter adds;
    trained: sizes of all that is trained, in the model's order, each with the index of its layer
    (None outside of them). quantizable: (out, in) of the weights that quantization takes; plain:
    how many values are in all others.
    """

    parameters: dict[str, int]
    adapter: tuple[int, ...]
    tensors: tuple[tuple[int | None, int], ...]
    quantizable: tuple[tuple[int, int], ...]
    plain: int

    @property
    def base(self) -> int:
        """Parameters without the adapter's."""
        return sum(self.parameters.values())

    @property
    def trained(self) -> list[int]:
        """Sizes of what is trained."""
        return [size for _, size in self.tensors]

    def trained_of(self, layers: int) -> list[int]:
        """The same of a model that ends behind so many layers."""
        return [size for index, size in self.tensors if index is None or index < layers]


def shape_of(config: ModelConfig, adapter: AdapterConfig | None) -> Shape:
    """The shape of a model and its adapter; None trains every weight.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    model = new_model(config)
    kinds = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        kinds[_kind(name)] += parameter.numel()
    weights = [m for n, m in model.named_modules() if quantizable(n, m)]
    sizes = tuple((m.out_features, m.in_features) for m in weights if isinstance(m, nn.Linear))
    base = sum(kinds.values())
    if adapter is None:
        model.requires_grad_(True)
    else:
        _put(model, adapter)
    tensors = [
        (_layer(name), parameter.numel())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    trained = [size for _, size in tensors]
    assert count_parameters(model)[0] == sum(trained)
    return Shape(
        {kind: count for kind, count in kinds.items() if count},
        tuple(trained if adapter is not None else ()),
        tuple(tensors),
        sizes,
        base - sum(rows * columns for rows, columns in sizes),
    )


def _put(model: Model, adapter: AdapterConfig) -> None:
    """The adapter into the model on the meta device.

    Raises:
        AdapterError: it does not fit, or starts from values that are not here.
    """
    try:
        with undrawn():
            add_adapter(model, drawn_plainly(adapter))
    except LoraxError:
        raise
    except Exception as error:
        raise AdapterError(
            f"{type(adapter).__name__} starts from values of the model or its tokenizer "
            f"({type(error).__name__}: {error}), and here are none; take a plain LoRA instead"
        ) from error


def _layer(name: str) -> int | None:
    """The index of the layer that a parameter is in."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _kind(name: str) -> str:
    """The kind of a parameter, by what its module is called."""
    *parts, _ = name.split(".")
    path = ".".join(parts[:-1])
    if parts[-1] == "lm_head":
        return "head"
    if "embed" in parts[-1] or parts[-1] in ("wte", "wpe"):
        return "embedding"
    if "norm" in parts[-1] or parts[-1].startswith("ln_"):
        return "norm"
    if "attn" in path:
        return "attention"
    return "mlp" if "mlp" in path else "other"


def drawn_plainly(adapter: AdapterConfig) -> AdapterConfig:
    """The same tensors without a decomposition of weights, which there are none of here."""
    if isinstance(adapter, LoRAConfig):
        return dataclasses.replace(adapter, init_lora_weights=True, loftq_config={})
    return adapter
