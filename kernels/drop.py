"""Drop: which dropout a Linear's input has in a step; an argument of the kernels and their twins.

dropout.py says how the mask follows from it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Drop(NamedTuple):
    """Dropout of one Linear's input in one step.

    seed: (1,) int64, on the device. site: which Linear, below 2^31. probability: in (0, 1).
    """

    seed: Tensor
    site: int
    probability: float

    @property
    def threshold(self) -> int:
        """What a word must reach, as a signed 32-bit number."""
        return round(self.probability * 2**32) - 2**31

    @property
    def scale(self) -> float:
        """What the values that stay are multiplied by."""
        return 1 / (1 - self.probability)
