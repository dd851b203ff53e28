"""config.json's content as a model's own config; what is not covered is refused by name.

Files come in several dialects: of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
of 5 (`rope_parameters`, `dtype`), under GPT-2's own names (`n_embd`) or the common ones
(`hidden_size`), and short ones, whose missing keys mean the defaults of transformers' classes. Each
means here what it means to transformers; the families' own readers are `ModelConfig.read`
(lorax/models). Dropout (`attention_dropout`, `attn_pdrop`, `resid_pdrop`, `embd_pdrop`) is read by
nobody: lorax computes without it, in training too.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lorax.errors import UnsupportedModel
from lorax.models.config import ModelConfig
from lorax.models.families import find_family
from lorax.models.model import Model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_config(found: dict[str, Any], where: str) -> ModelConfig:
    """Translate config.json's content.

    Raises:
        UnsupportedModel: the model type or one of its options is not covered.
        FormatError: the value of a key is impossible.
    """
    family = find_family(found.get("model_type"), where).config_class
    if isinstance(found.get("text_config"), dict):
        raise UnsupportedModel(
            f"{where}: text_config is a model inside a model, which is not covered; "
            "save the language model alone, by its own save_pretrained"
        )
    named = {key: found[alias] for alias, key in family.aliases.items() if alias in found}
    return family.read({**family.defaults, **found, **named}, where)


def stated_dtype(found: dict[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, in either dialect, if lorax computes in it."""
    return DTYPES.get(str(found.get("dtype") or found.get("torch_dtype")))


def new_model(config: ModelConfig) -> Model:
    """The model without memory: every parameter on the meta device, frozen, in eval mode."""
    family = find_family(config.model_type, type(config).__name__)
    with torch.device("meta"), undrawn():
        model = family.model_class(config)
    return model.requires_grad_(False).eval()


class undrawn(TorchFunctionMode):  # noqa: N801 - used as `with undrawn():`
    """Inside, torch.nn.init leaves tensors as they are.

    There is nothing to draw on the meta device, and `normal_` there imports torch's compiler, which
    takes longer than to read a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
