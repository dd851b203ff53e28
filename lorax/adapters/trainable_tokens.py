"""TokenRows: single rows of an embedding (or of the head) trained, the table itself frozen.

    trainable_token_indices = [5, 1]     x = 7 5 1 9 5
                                             | | | | |
    table W (V, C), frozen      ---->        7 . . 9 .
    rows  R (n, C), trained     ---->        . 0 1 . 0      in the order of the indices

The rows are replacements, not differences; they start as copies of the table's. They are float32
whatever the base is. A head that is tied to the embedding sees the same rows: its logits for these
tokens are x R^T. PEFT makes a copy of the whole table in every forward pass; here only the rows
are touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.tables import embedding_path, is_tied
from lorax.errors import AdapterError


class TokenRows(AdapterLayer):
    """An Embedding, or a Linear without bias, some of whose rows are trained.

    Args:
        base: the frozen module, weight (V, C).
        indices: which rows, each once, 0 <= i < V.
        tied_to: the embedding's rows, where this is the head that is tied to it.
    """

    file_base = "token_adapter.base_layer"

    def __init__(self, base: nn.Module, indices: list[int], tied_to: TokenRows | None = None):
        super().__init__(base)
        assert isinstance(base.weight, Tensor)
        weight = base.weight.detach()
        self.indices: Tensor
        self.place: Tensor
        where = torch.tensor(indices, device=weight.device)
        place = torch.full((len(weight),), -1, device=weight.device)  # token -> its row, or -1
        place[where] = torch.arange(len(indices), device=weight.device)
        self.register_buffer("indices", where, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.is_tied = tied_to is not None
        rows = nn.Parameter(weight[where].float()) if tied_to is None else tied_to.rows
        # A module of its own, behind the base: the model's first parameter stays the base's.
        self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": rows})

    @property
    def rows(self) -> nn.Parameter:
        """(n, C) float32; PEFT calls them a delta, which they are not."""
        rows: nn.Parameter = self.token_adapter["trainable_tokens_delta"]
        return rows

    def adapted(self, x: Tensor) -> Tensor:
        """Embedding: (...) int64 -> (..., C). Head: (..., C) -> (..., V)."""
        return self.path_onto(self.base_layer(x), x)

    def path_onto(self, y: Tensor, x: Tensor) -> Tensor:
        """y, the base's for x, with the rows in their places; shapes are those of `adapted`."""
        if isinstance(self.base_layer, nn.Linear):
            return y.index_copy(-1, self.indices, F.linear(x, self.rows.to(x.dtype)))
        place = self.place[x]  # (...)
        own = F.embedding(place.clamp_min(0), self.rows.to(y.dtype))  # (..., C)
        return torch.where((place >= 0)[..., None], own, y)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The rows; none for a tied head, whose rows are the embedding's."""
        return {} if self.is_tied else {"token_adapter.trainable_tokens_delta": self.rows}

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table with its rows replaced, (V, C)."""
        return (
            self.base_weight().to(dtype).index_copy(0, self.indices, self.rows.detach().to(dtype))
        )

    def effective_bias(self) -> Tensor | None:
        """None: neither an embedding nor such a head has one."""
        return None

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"rows={len(self.indices)}, tied={self.is_tied}"


def find_rows(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[list[int], bool]]:
    """Which modules have rows trained: path -> (indices, whether tied to the embedding's).

    By PEFT's rules: a list is the input embedding's, in a dict a path ends in the name. The head
    of a tied model follows the embedding, unless it is given other indices, which unties it.

    Raises:
        AdapterError: a name matches nothing, or no table; an index is out of range or there twice;
            a head that would follow is adapted or trained as a whole.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    embedding = embedding_path(model) or "embed_tokens"  # what PEFT looks for where none is named
    tied = is_tied(model)
    found: dict[str, tuple[list[int], bool]] = {}
    modules = {name: module for name, module in model.named_modules() if name}
    for key, indices in (wanted if isinstance(wanted, dict) else {embedding: wanted}).items():
        names = [name for name in modules if name.endswith(key)]
        if not names:
            raise AdapterError(f"trainable_token_indices: {key!r} matches no module; mend the key")
        for name in names:
            _check_table(name, modules[name], indices)
            found[name] = (indices, False)
    if tied and embedding in found:
        indices = found[embedding][0]
        if found.get("lm_head", (indices,))[0] == indices:
            found["lm_head"] = (indices, True)
        elif config.ensure_weight_tying:
            raise AdapterError(
                "trainable_token_indices: other rows for the head than for the embedding, "
                "although ensure_weight_tying ties them; give both the same rows, or unset it"
            )
    for name, (_, follows) in found.items():
        _check_free(name, follows, config)
    return found


def put_rows(model: nn.Module, found: dict[str, tuple[list[int], bool]]) -> None:
    """Put the layers in, the embedding's before the head that follows it."""
    embedding = None
    for name, (indices, follows) in sorted(found.items(), key=lambda item: item[1][1]):
        module = model.get_submodule(name)
        layer = TokenRows(module, indices, embedding if follows else None)
        if name == embedding_path(model):
            embedding = layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(module.training))


def rows_of(layers: Mapping[str, AdapterLayer]) -> dict[str, TokenRows]:
    """Those of the layers that are single rows."""
    return {n: layer for n, layer in layers.items() if isinstance(layer, TokenRows)}


def tie_merged(layers: Mapping[str, AdapterLayer], merged: dict[str, nn.Module]) -> None:
    """Let a merged head that follows the embedding's rows be the merged embedding again."""
    rows = rows_of(layers)
    for name, layer in rows.items():
        for other, leader in rows.items():
            if layer.is_tied and not leader.is_tied and layer.rows is leader.rows:
                merged[name].weight = merged[other].weight


def _check_table(name: str, module: nn.Module, indices: list[int]) -> None:
    table = isinstance(module, nn.Embedding) or (
        isinstance(module, nn.Linear) and module.bias is None
    )
    if not table:
        raise AdapterError(
            f"trainable_token_indices: {name} is a {type(module).__name__}; expected an Embedding "
            "or a Linear without bias; name one of those"
        )
    assert isinstance(module.weight, Tensor)
    size = len(module.weight)
    if not indices or len(set(indices)) < len(indices):
        found = f"found {indices!r:.80}"
        raise AdapterError(
            f"trainable_token_indices: {name}: expected some rows, each once; {found}; mend the "
            "list"
        )
    if min(indices) < 0 or max(indices) >= size:
        raise AdapterError(
            f"trainable_token_indices: {name}: rows {min(indices)} to {max(indices)}; it has "
            f"rows 0 to {size - 1}; leave the others out"
        )


def _check_free(name: str, follows: bool, config: LoRAConfig) -> None:
    why = "it is tied to the embedding and follows its rows" if follows else "its rows are trained"
    if config.selects(name):
        raise AdapterError(
            f"trainable_token_indices: {name} is among target_modules too, and {why}; "
            "the two together are not covered; leave it out of one of the two"
        )
    if any(name.endswith(saved) for saved in config.modules_to_save or []):
        raise AdapterError(
            f"trainable_token_indices: {name} is among modules_to_save too, and {why}; leave it "
            "out of one of the two"
        )
