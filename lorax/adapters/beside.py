"""What a config trains of the model itself, beside the layers around modules.

trainable_token_indices                       single rows        trainable_tokens.py
modules_to_save, bias, ensure_weight_tying    whole parameters   modules_to_save.py
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.modules_to_save import find_parameters, replace_parameters
from lorax.adapters.trainable_tokens import find_rows, put_rows


class Beside:
    """The rows and parameters that a config names: found first, put in once all is found.

    model: without an adapter. targets: the paths of the modules that get a layer.

    Raises:
        AdapterError: a name matches nothing that can be trained, or something twice over.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, targets: Collection[str]):
        self._model = model
        self._rows = find_rows(model, config)
        self._whole = find_parameters(model, config, {*targets, *self._rows})

    def put(self) -> None:
        """Put them in; the layers are in their places."""
        put_rows(self._model, self._rows)
        replace_parameters(self._model, self._whole)
