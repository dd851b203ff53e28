"""The cache of several prompts that are answered together, each with a length of its own.

    keys, values   (L, slots, K, places, D), allocated once; torch gives pages as they are written
    lengths        how many places of each slot are filled

A prompt goes through the model alone (`whole`), so that nothing is padded. Then all rows take their
next token in one pass (`step`): every Linear reads its weight once for all of them, and positions
and attention are each row's own. A row's numbers do not depend on the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lorax.errors import UnsupportedModel
from lorax.inference.native import KINDS, Layer, library, uses_native
from lorax.models import Model
from lorax.models.attention import Context, causal_attention
from lorax.models.cache import KVCache


class RowsCache:
    """Keys and values of `slots` rows of up to `places` tokens, the model's prefix beside them."""

    def __init__(self, model: Model, slots: int, places: int):
        self.all = KVCache.of(model, slots, places)
        self.lengths = [0] * slots
        self.tables: dict[torch.dtype, list[Any] | None] = {}

    def table(self, ropes: Callable[[int, Tensor], list[Any]], x: Tensor) -> list[Any] | None:
        """Each layer's rotations of every place, (places, D) each, made once.

        None where a position's angles follow from the length as well (models/stretching.py): then
        some place has others when it is asked for alone.
        """
        if x.dtype not in self.tables:
            places = self.all.keys.shape[3]
            made = ropes(0, x[:1, :1].expand(-1, places, -1))
            self.tables[x.dtype] = made if _follow_from_places(ropes, x, places) else None
        return self.tables[x.dtype]

    def whole(self, slot: int) -> Slot:
        """For a pass of all the tokens of a slot's row, which forgets what the slot held."""
        self.lengths[slot] = 0
        return Slot(self, slot)

    def step(self, slots: list[int]) -> Step:
        """For a pass of one token (B, 1) for each of these slots."""
        return Step(self, slots)


def _follow_from_places(ropes: Callable[[int, Tensor], list[Any]], x: Tensor, places: int) -> bool:
    """Whether rotations are the same in a sequence of so many places and where that place ends."""
    one = x[:1, :1].float()
    wholes = ropes(0, one.expand(-1, places, -1))
    return all(
        torch.allclose(whole[place], alone[0], rtol=0, atol=1e-6)
        for place in {min(1, places - 1), places // 2, places - 1}  # place 0 is never turned
        for layer, mine in zip(wholes, ropes(place, one), strict=True)
        for whole, alone in zip(layer, mine, strict=True)
    )


class Slot(KVCache):
    """One slot as the cache of a batch of one."""

    def __init__(self, cache: RowsCache, slot: int):
        self.keys = cache.all.keys[:, slot : slot + 1]
        self.values = cache.all.values[:, slot : slot + 1]
        self.length = 0
        self.cache, self.slot = cache, slot

    def close(self, x: Tensor, tokens: int) -> Tensor:
        """See `KVCache`; the slot's length is what went in."""
        x = super().close(x, tokens)
        self.cache.lengths[self.slot] = self.length
        return x


class Step(Context):
    """One token for each of some slots: it stands behind what its slot holds, and sees that."""

    def __init__(self, cache: RowsCache, slots: list[int]):
        self.cache, self.slots = cache, slots
        self.lengths = [cache.lengths[slot] for slot in slots]
        kept = cache.all.keys
        assert max(self.lengths) < kept.shape[3], "native.c writes without looking"
        native = kept.dtype in KINDS and uses_native(kept)
        self.is_native = native and library() is not None
        count = len(slots)
        self.places_of = (ctypes.c_int64 * count)(*self.lengths)
        self.slots_of = (ctypes.c_int64 * count)(*slots)

    def open(self, prefix: Any, x: Tensor) -> tuple[Tensor, Context]:
        """The prefix is in the cache already."""
        return x, self

    def places(self, x: Tensor) -> Tensor:
        """Each row's position: (B, 1)."""
        return torch.tensor(self.lengths, device=x.device)[:, None]

    def turns(self, ropes: Callable[[int, Tensor], list[Any]], x: Tensor) -> list[Any]:
        """Each layer's rotations, of each row's position: cosine and sine, (B, 1, 1, D)."""
        table = self.cache.table(ropes, x)
        if table is None:
            rows = zip(self.lengths, x.split(1), strict=True)
            each = zip(*(ropes(n, row) for n, row in rows), strict=True)  # a layer's, of each row
            return _shared(each, lambda parts: [torch.cat(s) for s in zip(*parts, strict=True)])
        places = torch.tensor(self.lengths, device=x.device)
        return _shared(zip(table, strict=True), lambda whole: [s[places] for s in whole[0]])

    def is_native_for(self, x: Tensor) -> bool:
        """Whether native.c attends for queries like x, and turns them where `rope` is given."""
        return self.is_native and x.dtype == self.cache.all.keys.dtype

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """Store key and value (B, K, 1, D); attend by query (B, H, 1, D) in each row's slot."""
        keys, values = self.cache.all.keys[layer], self.cache.all.values[layer]
        attend = attend_native if self.is_native_for(query) else attend_plain
        return attend(self, keys, values, query, key, value, **how)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of one row: all that it attends to. A family's own attention may ask for this.

        Raises:
            UnsupportedModel: several rows, whose places are not the same.
        """
        if len(self.slots) > 1:
            raise UnsupportedModel(
                "this family's attention does not keep rows of different lengths apart; give a "
                "batch size of 1, or let it call context.attend (lorax/models/attention.py)"
            )
        (slot,), (length,) = self.slots, self.lengths
        keys, values = self.cache.all.keys[layer], self.cache.all.values[layer]
        keys[slot, :, length], values[slot, :, length] = key[0, :, 0], value[0, :, 0]
        return keys[slot : slot + 1, :, : length + 1], values[slot : slot + 1, :, : length + 1]

    def close(self, x: Tensor, tokens: int) -> Tensor:
        """Each slot holds one token more."""
        for slot in self.slots:
            self.cache.lengths[slot] += 1
        return x


def attend_plain(
    step: Step, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, **how: Any
) -> Tensor:
    """`Step.attend` over one layer's keys and values (slots, K, places, D), a row at a time."""
    found = []
    for row, (slot, length) in enumerate(zip(step.slots, step.lengths, strict=True)):
        keys[slot, :, length], values[slot, :, length] = key[row, :, 0], value[row, :, 0]
        seen = (x[slot : slot + 1, :, : length + 1] for x in (keys, values))
        found.append(causal_attention(query[row : row + 1], *seen, **how))
    return torch.cat(found)


def attend_native(
    step: Step,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`attend_plain` by native.c, in float32 within.

    rope: cosine and sine, (B, 1, 1, P) in the query's dtype, of queries and keys that are not
        turned yet.
    """
    compiled = library()
    assert compiled is not None
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    _, heads, _, width = query.shape
    _, kv_heads, places, _ = keys.shape
    layer = Layer(
        *(KINDS[keys.dtype], heads, kv_heads, width, places), keys.data_ptr(), values.data_ptr()
    )
    out = torch.empty_like(query)
    tables = [None, None] if rope is None else [part.contiguous().data_ptr() for part in rope]
    compiled.attend(
        *(ctypes.addressof(layer), query.data_ptr(), key.data_ptr(), value.data_ptr()),
        *(out.data_ptr(), ctypes.addressof(step.slots_of), ctypes.addressof(step.places_of)),
        *(*tables, 0 if rope is None else rope[0].shape[-1], len(step.slots), window or 0),
        *(width**-0.5 if scale is None else scale, cap or 0.0, torch.get_num_threads()),
    )
    return out


def _shared(
    layers: Iterable[tuple[Any, ...]], make: Callable[[tuple[Any, ...]], list[Tensor]]
) -> list[Any]:
    """`make` of each layer's rotations, (B, D), as (B, 1, 1, D); of what layers share, once."""
    found, made = [], {}
    for parts in layers:
        key = tuple(map(id, parts))
        if key not in made:
            made[key] = tuple(s[:, None, None] for s in make(parts))
        found.append(made[key])
    return found
