"""The functions between an MLP's Linears, under the names that config.json gives them.

These are transformers' ACT2FN, less "prelu" and "xielu", which have weights of their own. Four
names stand for GELU's tanh form: they differ in the order of operations only.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax.errors import UnsupportedModel


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh in the place of the error function (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


def read_activation(values: dict[str, Any], key: str, where: str) -> str:
    """The name of an activation that there is.

    Raises:
        UnsupportedModel: another one.
    """
    name = values[key]
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{where}: {key} {name!r} is not covered; lorax has {', '.join(ACTIVATIONS)}; mend "
            "it, or take another model"
        )
    return name
