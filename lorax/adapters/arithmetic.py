"""Adapters as data that one can calculate with, and what their size and direction are.

A LoRA is a matrix a layer, D = s B A of rank r, and everything here works on its two factors:

    add         s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]      exact, of rank r1 + r2
    norms       A^T = Q_A R_A, B = Q_B R_B:  D = Q_B (s R_B R_A^T) Q_A^T, and the core in the
                middle, (r, r), has D's singular values
    truncate    the core's k largest components; what is lost is the root of the squared rest
    angle       2 atan2(||d - e||, ||d + e||) with d = D / ||D||, e = E / ||E|| (Kahan): exact near
                0 and 180 degrees too, where the arc cosine loses half of the digits

No matrix of the weight's size is ever formed: a layer costs O((in + out) r^2). Cores are float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorax.adapters.attached import require_adapter
from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.stated import adapter_config
from lorax.adapters.variants import variant_of
from lorax.errors import AdapterError
from lorax.models.model import Model


@dataclass(frozen=True)
class LowRank:
    """A matrix scaling * B A with A (r, in) and B (out, r); (out, in) as a weight."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """r: the number of components, whatever the matrix' rank is."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix, (out, in)."""
        return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scaling)

    def __mul__(self, weight: float) -> LowRank:
        return dataclasses.replace(self, scaling=self.scaling * weight)

    __rmul__ = __mul__

    def __add__(self, other: LowRank) -> LowRank:
        """By concatenation. Where the scales differ in more than sign, B takes them up."""
        if self.shape != other.shape:
            raise AdapterError(
                f"shapes {self.shape} and {other.shape} cannot be added"
                "; give adapters of one base model"
            )
        scale = self.scaling if abs(self.scaling) == abs(other.scaling) else 1.0
        scale = scale or 1.0
        parts = [m.B if m.scaling == scale else m.B * (m.scaling / scale) for m in (self, other)]
        return LowRank(torch.cat([self.A, other.A]), torch.cat(parts, dim=1), scale)

    def __sub__(self, other: LowRank) -> LowRank:
        return self + -1.0 * other

    def double(self) -> LowRank:
        """The same in float64, where scales are taken up with no loss."""
        return LowRank(self.A.double(), self.B.double(), self.scaling)

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_B (out, p), the core (p, q) and Q_A (in, q), float64: D = Q_B core Q_A^T."""
        Q_B, R_B = torch.linalg.qr(self.B.double())
        Q_A, R_A = torch.linalg.qr(self.A.double().t())
        return Q_B, self.scaling * (R_B @ R_A.t()), Q_A

    def singular_values(self) -> Tensor:
        """At most r of them, the largest first, float64; the matrix' others are zero."""
        return torch.linalg.svdvals(self.core()[1])

    def truncate(self, k: int) -> tuple[LowRank, float]:
        """The nearest matrix of rank k (Eckart and Young), and its distance ||D - D_k||."""
        if k < 1:
            raise AdapterError(f"cannot truncate to rank {k}; expected 1 or more")
        Q_B, core, Q_A = self.core()
        U, S, Vt = torch.linalg.svd(core)
        root = S[:k].sqrt()
        B, A = Q_B @ (U[:, : len(root)] * root), (root[:, None] * Vt[: len(root)]) @ Q_A.t()
        nearest = LowRank(A.to(self.A.dtype).contiguous(), B.to(self.B.dtype).contiguous())
        return nearest, S[k:].norm().item()


@dataclass(frozen=True)
class Adapter:
    """A LoRA as data: a matrix for each module's path. `a + b`, `a - b`, `0.5 * a`.

    base: the base model that it was trained on, as its file names it.
    config: what else a file says of it (dropout, fan_in_fan_out); ranks and scales are the layers'.

    A layer that only one of two adapters has counts as zero in the other.
    """

    layers: dict[str, LowRank]
    base: str | None = None
    config: LoRAConfig = field(default_factory=LoRAConfig)

    @staticmethod
    def of(model: nn.Module) -> Adapter:
        """A model's adapter; PiSSA and OLoRA as the plain LoRA of rank 2r that they amount to.

        Raises:
            AdapterError: there is none, or it is more than a low-rank matrix beside the weight.
        """
        found, config = require_adapter(model), adapter_config(model)
        check_low_rank(config, "the model's adapter")
        layers = {}
        for name, layer in found.items():
            try:
                layers[name] = LowRank(*layer.low_rank())
            except AdapterError as error:
                raise AdapterError(f"{name} {error}") from None
        turned = isinstance(model, Model) and model.transposed is not None
        config = dataclasses.replace(config, fan_in_fan_out=turned)
        return Adapter(layers, getattr(model, "name_or_path", "") or None, config)

    def __mul__(self, weight: float) -> Adapter:
        layers = {name: weight * layer for name, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers)

    __rmul__ = __mul__

    def __add__(self, other: Adapter) -> Adapter:
        layers = dict(self.layers)
        for name, theirs in other.layers.items():
            layers[name] = layers[name] + theirs if name in layers else theirs
        return dataclasses.replace(self, layers=layers)

    def __sub__(self, other: Adapter) -> Adapter:
        return self + -1.0 * other

    def truncate(self, k: int) -> tuple[Adapter, dict[str, float]]:
        """Each layer's nearest matrix of rank k, and ||D - D_k|| / ||D|| for each (0 for D = 0)."""
        layers, errors = {}, {}
        for name, layer in self.layers.items():
            layers[name], lost = layer.truncate(k)
            errors[name] = lost / norm(layer) if lost else 0.0
        return dataclasses.replace(self, layers=layers), errors

    def norm(self) -> float:
        """The Frobenius norm of all layers together."""
        return math.hypot(*(norm(layer) for layer in self.layers.values()))

    def plain_config(self) -> LoRAConfig:
        """The config under which PEFT and lorax read these layers with their ranks and scales.

        The commonest rank and alpha become r and lora_alpha; the other layers get a line in
        rank_pattern and alpha_pattern.
        """
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        alphas = {name: _alpha(layer.scaling * layer.rank) for name, layer in self.layers.items()}
        r = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        return LoRAConfig(
            r=r,
            lora_alpha=alpha,
            target_modules=sorted(self.layers),
            rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
            alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
            lora_dropout=self.config.lora_dropout,
            fan_in_fan_out=self.config.fan_in_fan_out,
        )


@dataclass(frozen=True)
class Size:
    """One layer's, or where `layer` is "all" the whole adapter's.

    frobenius, spectral: the norms of D; all layers together are one block-diagonal matrix.
    effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007); r
        where all components weigh the same, 1 where one outweighs the others, 0 for D = 0.
    angle, cosine: to the same layer of another adapter, in degrees; NaN where one is zero, None
        where no other was given.
    """

    layer: str
    rank: int
    frobenius: float
    spectral: float
    effective_rank: float
    cosine: float | None = None
    angle: float | None = None


def norm(matrix: LowRank) -> float:
    """||D||, the Frobenius norm."""
    return matrix.core()[1].norm().item()


def inner(one: LowRank, two: LowRank) -> float:
    """<D, E> = sum of D * E, through (r1, r2) matrices: s1 s2 sum((B1^T B2) * (A1 A2^T))."""
    if one.shape != two.shape:
        raise AdapterError(
            f"shapes {one.shape} and {two.shape} have no inner product"
            "; give adapters of one base model"
        )
    B = one.B.double().t() @ two.B.double()
    A = one.A.double() @ two.A.double().t()
    return one.scaling * two.scaling * (A * B).sum().item()


def angle(one: Adapter, two: Adapter) -> float:
    """The angle between two adapters as vectors of all their entries, in degrees: 0 ... 180.

    NaN where one of them is zero.
    """
    sizes = one.norm(), two.norm()
    if 0.0 in sizes:
        return math.nan
    d, e = (
        Adapter({name: 1 / size * layer.double() for name, layer in adapter.layers.items()})
        for size, adapter in zip(sizes, (one, two), strict=True)
    )
    return math.degrees(2 * math.atan2((d - e).norm(), (d + e).norm()))


def cosine(one: Adapter, two: Adapter) -> float:
    """The angle's cosine, -1 ... 1; NaN where an adapter is zero."""
    sizes = one.norm() * two.norm()
    both = [(one.layers[name], two.layers[name]) for name in one.layers if name in two.layers]
    return sum(inner(*pair) for pair in both) / sizes if sizes else math.nan


def sizes(adapter: Adapter, against: Adapter | None = None) -> Iterator[Size]:
    """Every layer's size, and at last that of all; with another adapter, the angles to it."""
    everything = []
    for name, layer in adapter.layers.items():
        values = layer.singular_values()
        everything.append(values)
        other = None if against is None else _part(against, name)
        yield _size(name, layer.rank, values, _part(adapter, name), other)
    ranks = sum(layer.rank for layer in adapter.layers.values())
    yield _size("all", ranks, torch.cat(everything), adapter, against)


def check_low_rank(config: AdapterConfig, where: str) -> None:
    """Refuse a config whose adapter is more than a low-rank matrix beside the weight.

    Raises:
        AdapterError: with the field.
    """
    variant = variant_of(config)
    if variant.no_matrix:
        raise AdapterError(f"{where} {variant.no_matrix}")
    plain = LoRAConfig()
    for key in ("bias", "modules_to_save", "trainable_token_indices"):
        value = getattr(config, key)
        if value != getattr(plain, key):
            raise AdapterError(
                f"{where} has {key} = {value!r}: it is no low-rank matrix alone, and there is no "
                "adding or comparing it; give an adapter trained without it"
            )


def _part(adapter: Adapter, name: str) -> Adapter:
    layers = {name: adapter.layers[name]} if name in adapter.layers else {}
    return dataclasses.replace(adapter, layers=layers)


def _size(name: str, rank: int, values: Tensor, one: Adapter, two: Adapter | None) -> Size:
    return Size(
        layer=name,
        rank=rank,
        frobenius=values.norm().item(),
        spectral=values.max().item(),
        effective_rank=_effective_rank(values),
        cosine=None if two is None else cosine(one, two),
        angle=None if two is None else angle(one, two),
    )


def _effective_rank(values: Tensor) -> float:
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return torch.special.entr(shares).sum().exp().item()


def _alpha(value: float) -> float:
    """A whole number where it is one: PEFT's files say 16, not 16.0."""
    return int(value) if value == int(value) else value
