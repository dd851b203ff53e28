"""One batch whose rows have different adapters: the base's product once, each path for its rows.

    x (B, T, in) --+-- base: x W^T + b, all rows at once ---------------- y (B, T, out)
                   |                                                       |  |  |
                   +-- rows 0, 3: adapter "support" ----- A1, B1 ----------+  |  |
                   +-- rows 1:    adapter "coding" ------ A2, B2 -------------+  |
                       row 2:     no adapter, the base alone --------------------+

A layer's class says by `path_onto(y, x)` what its adapter makes of its base's output. Where a class
changes `adapted` or `frozen` and says nothing of that, its layer computes its rows by itself; so
does a merged one. On CUDA plain low-rank paths go through one segmented kernel, whatever number of
adapters the batch has (kernels/segmented.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.backend import uses_triton


class RowGroups:
    """Which rows of the batch have which adapter; all mixed layers of a model share one.

    names: one a row, None for the base alone.
    """

    def __init__(self, names: Sequence[str | None] = ()):
        self.names: list[str | None] = []
        self.groups: list[tuple[str, list[int]]] = []
        self.set(names)

    def set(self, names: Sequence[str | None]) -> None:
        """Another batch."""
        self.names = list(names)
        found: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                found.setdefault(name, []).append(row)
        self.groups = list(found.items())


class MixedLayer(AdapterLayer):
    """Stands where adapters have layers: (B, ...) -> (B, ...), each row by its own.

    base: the module that they are all around. rows: what the batch is, as it is set at each call.
    layers: by the adapters' names; a name that is not there leaves its rows to the base.
    """

    def __init__(self, base: nn.Module, rows: RowGroups):
        super().__init__(base)
        self.rows = rows
        self.layers: dict[str, nn.Module] = {}

    def tensors(self) -> dict[str, nn.Parameter]:
        """None: they are the layers' own."""
        return {}

    def adapted(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        y = self.base_layer(x)
        groups = [(self.layers[n], rows) for n, rows in self.rows.groups if n in self.layers]
        without_gradients = not torch.is_grad_enabled()  # which the kernel does not give
        if groups and without_gradients and uses_triton(x) and y.is_contiguous():
            groups = _by_kernel(y, x, groups)
        for layer, rows in groups:
            at = _index(rows, x.device)
            known: Any = layer  # with a path_onto, if it shares the base's product
            y[at] = known.path_onto(y[at], x[at]) if shares_base(layer) else layer(x[at])
        return y


def shares_base(layer: nn.Module) -> bool:
    """Whether `layer.path_onto(base_layer(x), x)` is all of what it computes now."""
    if not isinstance(layer, AdapterLayer) or not layer.enabled or layer.merged is not None:
        return False
    if getattr(layer, "drops", False):
        return False
    kinds = type(layer).__mro__
    owner = {n: _owner(kinds, n) for n in ("path_onto", "adapted", "frozen")}
    known = owner["path_onto"]
    return known < len(kinds) and known <= owner["adapted"] and known <= owner["frozen"]


def _owner(kinds: Sequence[type], name: str) -> int:
    """The place of the class that defines the name; behind the last where none does."""
    return next((i for i, kind in enumerate(kinds) if name in vars(kind)), len(kinds))


def is_low_rank(layer: nn.Module) -> TypeGuard[LoRALinear]:
    """Whether it adds scaling * B A x to its base's output and nothing else."""
    plain = getattr(type(layer), "path_onto", None) is LoRALinear.path_onto
    return plain and getattr(layer, "lora_B_bias", None) is None and shares_base(layer)


def _by_kernel(
    y: Tensor, x: Tensor, groups: list[tuple[nn.Module, list[int]]]
) -> list[tuple[nn.Module, list[int]]]:
    """Add the plain paths to y; gives the groups that are left."""
    from lorax.kernels import segmented

    paths, rows_of, others = [], [], []
    for layer, rows in groups:
        if is_low_rank(layer):
            paths.append(segmented.Path(*layer.factors(), layer.scaling))
            rows_of.append(rows)
        else:
            others.append((layer, rows))
    segmented.add_paths(y, x, paths, rows_of)
    return others


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    """The rows as an index: a view where they lie behind each other."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
