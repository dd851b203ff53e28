"""VeRA in one file, as a researcher adds a variant: lorax train recipe.toml --plugin vera.py

Vector-based Random Matrix Adaptation (Kopiczko et al., arXiv:2310.11454): all layers share one
random pair A and B, which is frozen; each layer trains a vector on either side of B.

    y = W x + b * (B (d * (A x)))          A (r, in), B (out, r) frozen; d (r,), b (out,) trained

A and B are drawn from a seed at the largest layer's size, and smaller layers take their first
columns and rows. So a file holds the vectors and the seed. PEFT's VeRA draws the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorax
from lorax.adapters.layer import AdapterLayer
from lorax.errors import AdapterError


@dataclass(frozen=True)
class VeRAConfig(lorax.LoRAConfig):
    """PEFT's names. r: the rank. d_initial: what d starts at. projection_prng_key: the seed."""

    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = False  # PEFT then draws A and B from the seed, as here

    peft_type: str = field(default="VERA", kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_projection:
            raise AdapterError("save_projection = True: A and B are drawn from the seed here")


class Projection(nn.Module):
    """The frozen pair, one for all layers: A (r, largest in) and B (largest out, r)."""

    def __init__(self, r: int, width: int, height: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (r, width)), ("B", (height, r))):
            bound = math.sqrt(6 / shape[1])  # kaiming-uniform, fan in
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=False)


class VeRALinear(AdapterLayer):
    """A frozen Linear with trained vectors d and b around the shared pair."""

    def __init__(self, base: nn.Module, projection: Projection, d_initial: float, dropout: float):
        super().__init__(base)
        self.projection, self.d_initial, self.dropout = projection, d_initial, dropout
        self.vera_lambda_d = nn.Parameter(torch.empty(projection.A.shape[0], device=self.device))
        self.vera_lambda_b = nn.Parameter(torch.empty(base.out_features, device=self.device))

    @classmethod
    def prepare(
        cls, model: nn.Module, targets: Mapping[str, nn.Module], config: VeRAConfig
    ) -> Projection:
        width = max(base.in_features for base in targets.values())
        height = max(base.out_features for base in targets.values())
        device = next(model.parameters()).device
        return Projection(config.r, width, height, config.projection_prng_key).to(device)

    @classmethod
    def wrap(cls, base: nn.Module, name: str, config: VeRAConfig, shared: Any) -> VeRALinear:
        return cls(base, shared, config.d_initial, config.lora_dropout)

    def initialize(self, how: bool | str) -> None:
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def pair(self) -> tuple[Tensor, Tensor]:
        """This layer's part of A (r, in) and B (out, r)."""
        A, B = self.projection.A, self.projection.B
        return A[:, : self.base_layer.in_features], B[: self.base_layer.out_features]

    def adapted(self, x: Tensor) -> Tensor:
        A, B = (matrix.to(x.dtype) for matrix in self.pair())
        d, b = self.vera_lambda_d.to(x.dtype), self.vera_lambda_b.to(x.dtype)
        h = F.linear(F.dropout(x, self.dropout, self.training), A)  # (..., r)
        return self.base_layer(x) + b * F.linear(d * h, B)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"vera_lambda_d": self.vera_lambda_d, "vera_lambda_b": self.vera_lambda_b}

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        A, B = (matrix.to(dtype) for matrix in self.pair())
        d, b = self.vera_lambda_d.detach().to(dtype), self.vera_lambda_b.detach().to(dtype)
        return self.base_weight().to(dtype) + (b[:, None] * B) @ (d[:, None] * A)


lorax.register_variant(
    lorax.Variant(
        "vera",
        VeRAConfig,
        title="VeRA",
        in_peft=True,
        summary=lambda config: f"VeRA of rank {config.r}, seed {config.projection_prng_key}",
        layer=VeRALinear,
        unused=frozenset(
            {"save_projection", "lora_alpha", "use_rslora", "use_dora", "lora_bias",
             "init_lora_weights", "loftq_config", "rank_pattern", "alpha_pattern"}
        ),
        has_b=False,
        no_verify="VeRA: verify does not know how PEFT merges it",
        no_matrix="is VERA: two vectors around a shared pair, and no LoRA that can be added",
    )
)  # fmt: skip
