"""The scalar coefficients of one AdamW step, computed once on the host in float64."""

from __future__ import annotations

from typing import NamedTuple

OUTGROWN = 16.0  # 8-bit states: g^2 beyond this many times v (bias-corrected) rounds v up


class AdamWStep(NamedTuple):
    """Coefficients of one tensor's AdamW step; with LoRA+ they differ between tensors."""

    decay: float  # 1 - learning_rate * weight_decay
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    root_correction2: float  # sqrt(1 - beta2^t)
    eps: float
    step_size: float  # learning_rate / (1 - beta1^t)
    outgrown: float  # OUTGROWN / (1 - beta2^t)

    @classmethod
    def at(
        cls,
        step: int,
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> AdamWStep:
        """The coefficients of step `step` (1-based)."""
        return cls(
            decay=1 - learning_rate * weight_decay,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            root_correction2=(1 - beta2**step) ** 0.5,
            eps=eps,
            step_size=learning_rate / (1 - beta1**step),
            outgrown=OUTGROWN / (1 - beta2**step),
        )
