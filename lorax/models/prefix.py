"""Places in front of the tokens, of which a plain model has none.

A model sends its first tokens' embeddings through its `prefix`; those of later tokens, which follow
a cache, go past it. What puts something in front says how many places that takes; positions, the
causal mask and the cache then count them, and the hidden states behind the last norm are cut to the
tokens that were given.
"""

from torch import Tensor, nn


class Prefix(nn.Module):
    """Nothing in front: x (B, T, C) -> (B, length + T, C) with length 0."""

    length = 0

    def forward(self, x: Tensor) -> Tensor:
        return x
