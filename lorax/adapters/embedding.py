"""LoRAEmbedding: a frozen table, held, and a low-rank table beside it.

    y = W[ids] + scaling * A^T[ids] B^T          W (vocab, dim), A (r, vocab), B (dim, r)

Rows of A^T are looked up like rows of W, so a step costs what its tokens cost. A starts at zero and
B random: the other way round than in a Linear, as in microsoft/LoRA and PEFT, whose tensor names
are `lora_embedding_A` and `lora_embedding_B`. There is no dropout: PEFT has none here either.

A head that is tied to the embedding goes on reading the base's table: the adapter changes what goes
into the model, not what comes out of it. Merging therefore unties the two.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.layer import AdapterLayer


class LoRAEmbedding(AdapterLayer):
    """A frozen Embedding with a trainable low-rank table.

    Args:
        base: (vocab, dim).
        r: the rank.
        scaling: what the low-rank table is multiplied by.
    """

    def __init__(self, base: nn.Embedding, r: int, scaling: float):
        super().__init__(base)
        self.r = r
        self.scaling = scaling
        vocabulary, dim = base.weight.shape
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, vocabulary, device=self.device))
        self.lora_embedding_B = nn.Parameter(torch.zeros(dim, r, device=self.device))

    @classmethod
    def wrap(cls, base: nn.Module, name: str, config: LoRAConfig, shared: Any) -> Self:
        """The layer around an Embedding, with the config's rank and scale for its path."""
        assert isinstance(base, nn.Embedding)
        return cls(base, config.rank(name), config.scaling(name))

    def initialize(self, how: bool | str) -> None:
        """B ~ N(0, 1) and A zero; with False, A ~ N(0, 1) too."""
        nn.init.normal_(self.lora_embedding_B)
        if how is False:
            nn.init.normal_(self.lora_embedding_A)
        else:
            nn.init.zeros_(self.lora_embedding_A)

    def adapted(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., dim)."""
        return self.path_onto(self.base_layer(ids), ids)

    def path_onto(self, y: Tensor, ids: Tensor) -> Tensor:
        """y + the low-rank rows of ids: (..., dim), (...) int64 -> (..., dim)."""
        h = F.embedding(ids, self.lora_embedding_A.t()).to(y.dtype)  # (..., r)
        B = self.lora_embedding_B.to(y.dtype)
        flat = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])  # a single token is a row
        path = torch.addmm(*flat, B.t(), alpha=self.scaling)
        return path.view(y.shape)

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B."""
        return {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the low-rank table adds: scaling * (B A)^T, (vocab, dim), computed in dtype."""
        A, B = self.lora_embedding_A.detach().to(dtype), self.lora_embedding_B.detach().to(dtype)
        return (A.t() @ B.t()).mul_(self.scaling)

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W + scaling * (B A)^T, (vocab, dim)."""
        return self.base_weight().to(dtype) + self.delta(dtype)

    def effective_bias(self) -> Tensor | None:
        """None: a table has no bias."""
        return None

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"r={self.r}, scaling={self.scaling:g}"
