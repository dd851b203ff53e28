"""AdaLoRALinear: a path B diag(E) A whose ranks can be taken away (Zhang et al. 2023).

    y = base(x) + alpha / (init_r + 1e-5) * ((dropout(x) (A * E)^T) B^T)

A (r, in), E (r, 1) and B (out, r) look like a singular value decomposition: E holds the values, and
a penalty in the loss keeps A's rows and B's columns about orthonormal. Which ranks go is decided in
`rank_allocator.py`. The scale stays what init_r made it, whatever is left. arXiv:2303.10512.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorax.adapters.adalora.config import AdaLoRAConfig as AdaLoRAConfig
from lorax.adapters.lora import LoRALinear


class AdaLoRALinear(LoRALinear):
    """A frozen Linear with a path B diag(E) A whose ranks can be taken away, down to none.

    lora_A (r, in), lora_E (r, 1), lora_B (out, r), all float32 and trained. r may be 0, and the
    layer then is its base. base, scaling, dropout: as `LoRALinear` has them.
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base, r, scaling, dropout)
        self.lora_E = nn.Parameter(torch.zeros(r, 1, device=self.device))

    def initialize(self, how: bool | str) -> None:
        """Draw A and B, and E where `how` is False; see `AdaLoRAConfig.init_lora_weights`."""
        std = 0.02 if how else 1.0
        nn.init.normal_(self.lora_A, std=std)
        nn.init.normal_(self.lora_B, std=std)
        if how:
            nn.init.zeros_(self.lora_E)
        else:
            nn.init.normal_(self.lora_E)

    def adapted(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return super().adapted(x) if self.r else self.base_layer(x)

    def path_onto(self, y: Tensor, x: Tensor) -> Tensor:
        """y + the path of x; y itself where no rank is left."""
        return super().path_onto(y, x) if self.r else y

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A * E, (r, in), and B, (out, r), in dtype or their own."""
        A, B = super().factors(dtype)
        return A * self.lora_E.to(dtype), B

    def tensors(self) -> dict[str, nn.Parameter]:
        """A, B and E."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_E": self.lora_E}

    def prune(self, keep: list[bool]) -> None:
        """Leave only the ranks of which `keep` (r,) says so."""
        kept = torch.tensor(keep, dtype=torch.bool, device=self.device)
        needs_grad = self.lora_E.requires_grad
        self.lora_A = nn.Parameter(self.lora_A.detach()[kept], needs_grad)
        self.lora_E = nn.Parameter(self.lora_E.detach()[kept], needs_grad)
        self.lora_B = nn.Parameter(self.lora_B.detach()[:, kept].contiguous(), needs_grad)
        self.r = sum(keep)

    def orthogonality(self) -> list[Tensor]:
        """How far A's rows and B's columns are from orthonormal: two Frobenius norms."""
        A, B = self.lora_A, self.lora_B
        eye = torch.eye(self.r, device=A.device)
        return [(A @ A.t() - eye).norm(), (B.t() @ B - eye).norm()]
