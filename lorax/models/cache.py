"""The cache of keys and values, with which generation goes through each token once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorax.models.attention import Context

if TYPE_CHECKING:
    from lorax.models.model import Model


class KVCache(Context):
    """Keys and values of the tokens so far, allocated once: 2 x (L, B, K, max_length, D)."""

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (layers, batch, kv_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @classmethod
    def of(cls, model: Model, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, and the model's prefix."""
        sizes = model.config.sizes
        norm = model.body.get_submodule(model.norm_name).weight
        assert isinstance(norm, Tensor)
        places = model.body.prefix_length + max_length
        shape = (sizes.layers, batch, sizes.kv_heads, places, sizes.head_dim)
        return cls(*shape, norm.dtype, norm.device)

    def open(self, prefix: Any, x: Tensor) -> tuple[Tensor, Context]:
        return (x if self.length else prefix(x)), self

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, K, T, D) behind what is there; give all of it, (B, K, S, D)."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def close(self, x: Tensor, tokens: int) -> Tensor:
        self.length += x.shape[1]
        return x[:, -tokens:]
