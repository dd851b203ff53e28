"""What every model is, and what an architecture answers for itself.

    input_ids (B, T) -> body: embedding, layers, final norm -> (B, T, C) -> lm_head -> (B, T, V)

A family of models is two classes: a `ModelConfig` (config.py), which reads and writes config.json,
and a `Model`, which computes. Loading, saving, adapters, quantization and generation ask these two
and know no architecture by name; `lorax/models/families.py` is the table of those that there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorax.models.attention import Context, soft_cap

if TYPE_CHECKING:
    from lorax.models.config import ModelConfig
    from lorax.models.origin import Origin


class Prefix(nn.Module):
    """Nothing in front of the tokens: x (B, T, C) -> (B, length + T, C) with length 0.

    A tuned prompt takes its place. Positions, masks and caches count its `length`; the hidden
    states behind the last norm are cut to the tokens that were given.
    """

    length = 0

    def forward(self, x: Tensor) -> Tensor:
        return x


class Body(nn.Module):
    """What stands under the head: (B, T) -> (B, T, C), the final norm included.

    gradient_checkpointing: recompute each layer in the backward pass instead of keeping its
        insides; "selective" keeps what products gave (recompute.py).
    embedding_scale: what the tokens' embeddings are multiplied by, in the dtype that they have.
    """

    embedding_scale: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing: bool | str = False
        self.prefix: nn.Module = Prefix()

    @property
    def prefix_length(self) -> int:
        """How many places stand in front of the tokens."""
        length = self.prefix.length
        assert isinstance(length, int)
        return length

    def run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """One layer, checkpointed where that is asked for."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            from lorax.models.recompute import recomputed

            return recomputed(self.gradient_checkpointing, layer, *inputs)
        return layer(*inputs)

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., C), scaled."""
        if self.embedding_scale == 1.0:
            return embeddings
        scale = torch.tensor(self.embedding_scale, dtype=embeddings.dtype)
        return embeddings * scale.to(embeddings.device)


class Model(nn.Module):
    """A language model with its head: input_ids (B, T) int64 -> logits (B, T, V).

    A subclass makes its body and `lm_head` and calls `tie_weights`. What it may say differently:

    body_name: of the body, and of the parameters' prefix that some files leave out.
    embedding_name: the parameter of the tokens' embeddings.
    norm_name: the final norm, below the body.
    default_targets: the modules that PEFT adapts where nobody names any; None: PEFT has no default.
    transposed: the names of weights that files hold as (in, out); here every one is (out, in).
    """

    body_name: ClassVar[str] = "model"
    embedding_name: ClassVar[str] = "model.embed_tokens.weight"
    norm_name: ClassVar[str] = "norm"
    default_targets: ClassVar[tuple[str, ...] | None] = ("q_proj", "v_proj")
    transposed: ClassVar[re.Pattern[str] | None] = None

    lm_head: nn.Module
    adapter_config: Any  # of the adapter that stands in the model; unset without one

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.name_or_path = ""  # where it was loaded from, for the files that point back to it
        self.loaded_from: Path | None = None  # its files; None once its weights are not theirs
        self.origin: Origin | None = None  # its files still, for what they say beside the weights

    @property
    def body(self) -> Body:
        """What stands under the head."""
        body = self.get_submodule(self.body_name)
        assert isinstance(body, Body)
        return body

    @property
    def logit_cap(self) -> float | None:
        """c of c * tanh(logits / c), which some models put behind the head."""
        return None

    @property
    def max_positions(self) -> int:
        """How many tokens the positions cover, less those that a tuned prompt takes."""
        return self.config.positions - self.body.prefix_length

    @property
    def cache_border(self) -> int | None:
        """Beyond how many tokens a cache made before is of no use any more; None: never."""
        return None

    @property
    def gradient_checkpointing(self) -> bool | str:
        """Recompute each layer in the backward pass instead of keeping its insides."""
        return self.body.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool | str) -> None:
        self.body.gradient_checkpointing = on

    def tie_weights(self) -> None:
        """Let the head be the embedding where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_parameter(self.embedding_name)

    def hidden_states(self, input_ids: Tensor, context: Context | None = None) -> Tensor:
        """What the head reads: (B, T) -> (B, T, C)."""
        return self.body(input_ids, context or Context())

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., C) -> (..., V)."""
        return soft_cap(self.lm_head(hidden), self.logit_cap)

    def forward(self, input_ids: Tensor, cache: Context | None = None) -> Tensor:
        """(B, T) -> (B, T, V); with a cache the T tokens follow those that it holds."""
        return self.logits(self.hidden_states(input_ids, cache))

    def new_cache(self, batch: int, max_length: int) -> Context:
        """An empty cache for `batch` rows of up to `max_length` tokens."""
        from lorax.models.cache import KVCache

        return KVCache.of(self, batch, max_length)

    def as_stored(self, name: str, weight: Tensor) -> Tensor:
        """A plain weight in the files' orientation; one from a file, in the model's."""
        turn = self.transposed is not None and self.transposed.search(name) and weight.dim() == 2
        return weight.t() if turn else weight


Layer = Callable[[Any, int], nn.Module]
