"""Two sides, one text: every part held against its twin, in the order in which it is computed.

    for each module, in forward order:
        the base's 4-bit bytes and scales, its weight and bias          equal to the bit
        the adapter's tensors; the factor of the path                   equal to the bit
        effective weight, merged weight, output                         within rounding
    logits and loss, then the gradients from the last module to the first

So the first check that does not hold names the module and the part where the two sides part, and
what follows from it comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from lorax.adapters.config import LoRAConfig
from lorax.adapters.matching import matches_end
from lorax.adapters.stated import adapter_config
from lorax.adapters.tables import embedding_path
from lorax.parity import causes
from lorax.parity.difference import (
    COMPUTED,
    COMPUTED_BOUND,
    DECODED,
    EXACT,
    GRADIENT,
    REQUANTIZED,
    SCALING,
    WEIGHT,
    Difference,
    difference,
    gradient_bound,
    weight_bound,
)
from lorax.parity.report import Check, Nearer
from lorax.parity.sides import LoraxSide, Side
from lorax.quant import four_bit
from lorax.quant.linear import QuantizedLinear

DECOMPOSED = "a part was taken out of the base again on each side: 1e-5"
DECOMPOSED_BOUND = 1e-5
REQUANTIZED_BOUND = 2e-3
NESTED_BOUND = 2e-3  # relative RMS of a tensor's scales; a wrong code moves one of them by 1 %
Named = dict[str, Tensor]
ONE_SIDE = Difference(False, float("inf"), float("inf"), float("inf"), None)


def compare(
    mine: LoraxSide,
    theirs: Side,
    ids: Tensor,
    truth: Callable[[], LoraxSide] | None = None,
) -> list[Check]:
    """Hold two sides against each other.

    Args:
        mine, theirs: the sides, each with its adapter, trainable.
        ids: (B, T) token ids for the forward and backward passes, T at least 2.
        truth: loads the adapter afresh from its files. It is called where something differs, to
            say which side has the files' bytes and which one's effective weight is nearer to
            float64; None where the two sides are meant to be different files.

    Returns:
        The checks, in the order in which the parts are computed.
    """
    return list(_Comparison(mine, theirs, ids, truth).checks())


class _Comparison:
    def __init__(
        self,
        mine: LoraxSide,
        theirs: Side,
        ids: Tensor,
        truth: Callable[[], LoraxSide] | None,
    ):
        self.mine, self.theirs = mine, theirs
        self._load_truth = truth
        self.config: LoRAConfig = adapter_config(mine.model)
        self.tensors = mine.tensors(), theirs.tensors()
        self.homes = self._homes()
        # What stands still is compared before anything runs: bitsandbytes may repack weights then.
        self.still = {path: list(self._of_what_stands_still(path)) for path in self.common}
        self.traces = mine.run(ids), theirs.run(ids)

    @cached_property
    def common(self) -> list[str]:
        return [path for path in self.mine.modules if path in self.theirs.modules]

    @cached_property
    def truth(self) -> LoraxSide | None:
        return None if self._load_truth is None else self._load_truth()

    def checks(self) -> Iterator[Check]:
        called = [path for path in self.traces[0].outputs if path in self.common]
        order = [*called, *(path for path in self.common if path not in called)]
        for path in sorted(set(self.homes) - set(order)):  # a prompt: it stands before the rest
            yield from self._of_tensors(path)
        for path in order:
            yield from self.still[path]
            yield from self._of_output(path)
        one, other = self.traces
        yield _computed("", "logits", "", difference(one.logits, other.logits))
        losses = (torch.tensor(t.loss, dtype=torch.float64) for t in self.traces)
        yield _computed("", "loss", "", difference(*losses))
        for path in reversed(order):
            yield from self._of_gradients(path)

    # What is read ------------------------------------------------------------------------------

    def _of_what_stands_still(self, path: str) -> Iterator[Check]:
        bases = self.mine.base_tensors(path), self.theirs.base_tensors(path)
        packed = self._packed(self.mine, path), self._packed(self.theirs, path)
        yield from self._of_packed(path, *packed)
        yield from self._of_base(path, *bases, packed)
        yield from self._of_tensors(path)
        if self._adapted(path):
            yield from self._of_scaling(path)
            yield from self._of_effective_weight(path, bases[0]["weight"])
        yield from self._of_merged(path, bases[0])

    def _of_packed(self, path: str, one: Named, other: Named) -> Iterator[Check]:
        for part in [*one, *(part for part in other if part not in one)]:
            if part not in one or part not in other:
                yield self._one_sided(path, "4-bit base", part, part in one)
                continue
            yield Check(path, "4-bit base", part, _exact(one[part], other[part]), 0.0, EXACT)

    def _of_base(
        self, path: str, one: Named, other: Named, packed: tuple[Named, Named]
    ) -> Iterator[Check]:
        layer = self.mine.layers.get(path)
        decomposed = layer is not None and layer.moves_base
        for part in one:
            if part not in other and self._is_trained(path, part):
                continue  # where it stands, and compared as the adapter's
            if part not in other or one[part].shape != other[part].shape:
                yield self._one_sided(path, "base", part, part in one)
                continue
            decoded = bool(packed[0]) and part == "weight"
            gap = (_decoded if decoded else _exact)(one[part], other[part])
            note = "" if gap.equal else self._why_base(path, part, one[part], other[part], packed)
            if decomposed and part == "weight":
                note = "" if gap.relative <= DECOMPOSED_BOUND else note
                yield Check(path, "base", part, gap, DECOMPOSED_BOUND, DECOMPOSED, note)
            else:
                source = DECODED if decoded else EXACT
                yield Check(path, "base", part, gap, 0.0, source, note)

    def _why_base(
        self, path: str, part: str, one: Tensor, other: Tensor, packed: tuple[Named, Named]
    ) -> str:
        mine, theirs = packed
        same = set(mine) == set(theirs) and all(_exact(mine[k], theirs[k]).equal for k in mine)
        if part == "weight" and mine and same:
            block = self._quantized(path).block_size
            if one.shape[1] % block:
                return causes.AVX512.format(width=one.shape[1], block=block)
        said = causes.of_base(one, other, *self._differing_bases)
        file = None if self.truth is None else self.truth.base_tensors(path).get(part)
        return said + _right(one, other, file)

    @cached_property
    def _differing_bases(self) -> tuple[int, int]:
        """(base tensors that differ, all of them)."""
        differ = total = 0
        for path in self.common:
            one, other = self.mine.base_tensors(path), self.theirs.base_tensors(path)
            total += len(one)
            differ += sum(k not in other or not torch.equal(one[k], other[k]) for k in one)
        return differ, total

    def _of_tensors(self, path: str) -> Iterator[Check]:
        names = self.homes.get(path, [])
        one, other = ({n: t[n] for n in names if n in t} for t in self.tensors)
        short = {name: name.removeprefix(path + ".") for name in names}
        for name in names:
            if name not in one or name not in other or one[name].shape != other[name].shape:
                yield self._one_sided(path, "adapter tensor", short[name], name in one)
                continue
            gap, note = _exact(one[name], other[name]), ""
            if not gap.equal:
                file = None if self.truth is None else self.truth.tensors().get(name)
                a, b = ({short[n]: t.detach() for n, t in side.items()} for side in (one, other))
                note = causes.of_tensors(a, b, short[name], file)
            yield Check(path, "adapter tensor", short[name], gap, 0.0, EXACT, note)

    def _of_scaling(self, path: str) -> Iterator[Check]:
        one, other = self.mine.scaling(path), self.theirs.scaling(path)
        if one is None or other is None:
            return
        gap, note = difference(*(torch.tensor(s, dtype=torch.float64) for s in (one, other))), ""
        if not gap.equal:
            A = self.tensors[0].get(f"{path}.lora_A.weight")
            rank = None if A is None else A.shape[0]
            note = causes.of_scaling(one, other, rank, _overlapping(self.config, path))
            expected = self.truth and self.truth.scaling(path)
            if expected:
                equal = [w for w, s in (("lorax", one), ("PEFT", other)) if s == expected]
                note += f"; the config gives {expected:g}: {' and '.join(equal) or 'neither'}"
        yield Check(path, "scaling", "", gap, 1e-15, SCALING, note)

    # What is computed --------------------------------------------------------------------------

    def _of_effective_weight(self, path: str, base: Tensor) -> Iterator[Check]:
        one, other = self.mine.effective_weight(path), self.theirs.effective_weight(path)
        if one is None or other is None or one.shape != other.shape:
            return
        gap, note = difference(one, other), ""
        bound = weight_bound(one, base)
        if gap.relative > bound:
            note = causes.of_weights(one, other, base)
        nearer = None if gap.equal else self._nearer(path, one, other)
        yield Check(path, "effective weight", "", gap, bound, WEIGHT, note, nearer)

    def _nearer(self, path: str, one: Tensor, other: Tensor) -> Nearer | None:
        exact = None if self.truth is None else self.truth.exact_weight(path)
        if exact is None or exact.shape != one.shape:
            return None
        size = exact.norm().item() or 1.0
        errors = [(t.double() - exact).norm().item() / size for t in (one, other)]
        return Nearer(*errors)

    def _of_merged(self, path: str, bases: Named) -> Iterator[Check]:
        one, other = self.mine.merged(path), self.theirs.merged(path)
        for part in sorted(set(one) & set(other), reverse=True):
            if one[part].shape != other[part].shape:
                continue
            base = bases.get(part, torch.zeros_like(one[part]))
            if part == "weight" and self._packed(self.mine, path):
                yield self._of_requantized(path, other[part], base)
                continue
            gap, bound = difference(one[part], other[part]), weight_bound(one[part], base)
            yield Check(path, "merged weight", part, gap, bound, WEIGHT)

    def _of_requantized(self, path: str, other: Tensor, base: Tensor) -> Check:
        """PEFT's merged 4-bit weight against lorax's exact one, quantized for this."""
        q, one = self._quantized(path), self.mine.effective_weight(path)
        assert one is not None
        again = four_bit.quantize(one, q.format, q.block_size, name=path).dequantize(torch.float32)
        effect = (one.double() - base.double()).norm().item()
        lost = (other.double() - one.double()).norm().item()
        note = causes.REQUANTIZED.format(lost=lost / effect) if effect else ""
        bound = REQUANTIZED_BOUND + (0.0 if q.nested is None else NESTED_BOUND)
        gap = difference(again, other)
        return Check(path, "merged weight", "weight", gap, bound, REQUANTIZED, note)

    def _quantized(self, path: str) -> four_bit.FourBitTensor:
        module = self.mine.modules[path]
        base = self.mine.base_of(module) if self.mine.is_adapted(module) else module
        assert isinstance(base, QuantizedLinear)
        assert isinstance(base.quantized, four_bit.FourBitTensor)
        return base.quantized

    def _of_output(self, path: str) -> Iterator[Check]:
        one, other = (trace.outputs.get(path) for trace in self.traces)
        if one is None or other is None or one.numel() != other.numel():
            return
        if one.dim() == 4 and one.shape != other.shape:  # Qwen 3's norms of heads: (B, T, H, D)
            other = other.transpose(1, 2)
        if path == embedding_path(self.mine.model):  # Gemma's scales its rows inside the module
            one = self.mine.model.body.scaled(one)
        yield _computed(path, "output", "", difference(one, other.reshape(one.shape)))

    def _of_gradients(self, path: str) -> Iterator[Check]:
        largest = self._largest_gradient
        for name in reversed(self.homes.get(path, [])):
            one, other = (trace.gradients.get(name) for trace in self.traces)
            short = name.removeprefix(path + ".")
            if one is None and other is None:
                continue
            if one is None or other is None or one.shape != other.shape:
                yield self._one_sided(path, "gradient", short, one is not None)
                continue
            bound = gradient_bound(other, largest)
            yield Check(path, "gradient", short, difference(one, other), bound, GRADIENT)

    @cached_property
    def _largest_gradient(self) -> float:
        return max((g.norm().item() for g in self.traces[1].gradients.values()), default=0.0)

    # Helpers -----------------------------------------------------------------------------------

    def _adapted(self, path: str) -> bool:
        return any(side.is_adapted(side.modules[path]) for side in (self.mine, self.theirs))

    def _is_trained(self, path: str, part: str) -> bool:
        return any(f"{path}.{below}{part}" in self.tensors[0] for below in ("", "base_layer."))

    def _packed(self, side: Side, path: str) -> dict[str, Tensor]:
        module = side.modules[path]
        return side.packed(side.base_of(module) if side.is_adapted(module) else module)

    def _homes(self) -> dict[str, list[str]]:
        """Module -> its adapter tensors, of either side."""
        homes: dict[str, list[str]] = {}
        paths = sorted({*self.mine.modules, *self.theirs.modules}, key=len, reverse=True)
        for name in dict.fromkeys([*self.tensors[0], *self.tensors[1]]):
            above = (path for path in paths if name.startswith(path + "."))
            homes.setdefault(next(above, name.rpartition(".")[0]), []).append(name)
        return homes

    def _one_sided(self, path: str, quantity: str, part: str, is_mine: bool) -> Check:
        who = "lorax" if is_mine else "PEFT"
        note = f"{who} has it, the other side has none of this shape"
        return Check(path, quantity, part, ONE_SIDE, 0.0, EXACT, note)


def _computed(path: str, quantity: str, part: str, gap: Difference) -> Check:
    return Check(path, quantity, part, gap, COMPUTED_BOUND, COMPUTED)


def _right(one: Tensor, other: Tensor, file: Tensor | None) -> str:
    if file is None:
        return ""
    equal = [who for who, t in (("lorax", one), ("PEFT", other)) if torch.equal(t, file)]
    return f"; {equal[0]} has the file's values" if len(equal) == 1 else ""


def _decoded(mine: Tensor, theirs: Tensor) -> Difference:
    """`_exact`, but that a zero has no sign: adding 0 leaves all else as it is."""
    return _exact(mine + 0.0, theirs + 0.0)


def _exact(mine: Tensor, theirs: Tensor) -> Difference:
    if mine.numel() != theirs.numel():
        return ONE_SIDE
    return difference(mine.detach(), theirs.detach().reshape(mine.shape))


def _overlapping(config: LoRAConfig, path: str) -> bool:
    """Whether two keys of a pattern fit this module and ask for different values."""
    for patterns in (config.rank_pattern, config.alpha_pattern):
        fitting = {v for key, v in patterns.items() if matches_end(key, path)}
        if len(fitting) > 1:
            return True
    return False
