"""Routes: the ways to put an adapter into weights, and what each loses of it.

An adapter was trained over some weights W, and amounts to a change of them, here called its effect:

    exact  = W + scaling * B A          (or what the variant makes of it: `effective_weight`)
    effect = exact - W

A route writes something that is near `exact`, and loses ||written - exact|| / ||effect||, the share
of what was learned:

    route               written                                      what is lost
    float32             exact, W decoded if it is quantized          one rounding: 1e-6 of it
    bfloat16, float16   round(exact), once                           the rounding
    original-bfloat16   round(W0 + scaling * B A), W0 from before    what training over quantized
                        W was quantized                              weights had made up for
    nf4-dq              quantize(exact): what PEFT does with QLoRA   the quantization, often all
    nf4-dq+r16          the same, and the lost part in an adapter    what 16 directions cannot hold

All are computed in float32 or wider, from `exact`, and rounded or quantized once. Nothing here
holds more than one layer's weights beside the model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorax.adapters.attached import adapter_layers, require_adapter
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.merge import (
    check_finite,
    comparison_dtype,
    effect_of,
    frobenius,
    rounded_layer,
    unload_adapter,
)
from lorax.errors import UsageError
from lorax.merging.residual import truncated_svd
from lorax.models.replace import replace_module
from lorax.quant import codebooks, four_bit
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Original = Callable[[str], Tensor]  # a Linear's path -> its weight before quantization, (out, in)


@dataclass(frozen=True)
class Route:
    """One way to merge.

    dtype: of the dense weights; on a quantized route, of the rest, and what those are decoded to.
    original: over the weights from before quantization, not over those that were trained over.
    format: quantized again, in this 4-bit format; None stays dense.
    residual_rank: the part that quantizing lost is kept in an adapter of this rank; 0: it is lost.
    """

    dtype: torch.dtype
    original: bool = False
    format: str | None = None
    residual_rank: int = 0

    @staticmethod
    def parse(name: str, dtype: torch.dtype) -> Route:
        """The route of that name; `dtype` is that of a quantized one.

        Raises:
            UsageError: there is no such route.
        """
        match = re.fullmatch(r"(original-)?(\w+)|([\w-]+?)(?:\+r([1-9]\d{0,4}))?", name)
        if match and match[2] in DTYPES:
            return Route(DTYPES[match[2]], original=bool(match[1]))
        format, _, rank = name.partition("+r")
        if match and format in codebooks.formats():
            return Route(dtype, format=format, residual_rank=int(rank or 0))
        raise UsageError(
            f"route {name!r} is unknown; expected {', '.join(DTYPES)}, original-DTYPE, "
            f"{', '.join(codebooks.formats())}, or FORMAT+rRANK such as nf4-dq+r16"
        )

    @property
    def name(self) -> str:
        """What `parse` reads."""
        if self.format is not None:
            return self.format + (f"+r{self.residual_rank}" if self.residual_rank else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"original-{dtype}" if self.original else dtype

    def quantizes(self, name: str, base: nn.Module) -> bool:
        """Whether the module of that path comes out in 4 bits: every Linear but the head."""
        is_linear = isinstance(base, nn.Linear | QuantizedLinear)
        return self.format is not None and is_linear and name != "lm_head"

    def changes(self, name: str, module: nn.Module) -> bool:
        """Whether a Linear that the adapter leaves alone becomes another one on this route."""
        if isinstance(module, QuantizedLinear):
            four_bit = isinstance(module.quantized, FourBitTensor)
            return self.original or (self.quantizes(name, module) and not four_bit)
        return self.quantizes(name, module)


@dataclass(frozen=True)
class LayerCost:
    """What one layer loses on a route.

    lost: ||written - exact||, the residual counted as written; effect: ||exact - W||; both in the
    weights' unit. captured: how much of what quantizing lost the residual holds, of its square.
    """

    lost: float
    effect: float
    captured: float | None = None

    @property
    def share(self) -> float:
        """Of the adapter's own effect, what is lost (0 where the adapter does nothing)."""
        return self.lost / self.effect if self.effect else 0.0


@dataclass(frozen=True)
class RoutedLayer:
    """A layer as a route writes it: one frozen module, and A and B of its residual."""

    module: nn.Module
    cost: LayerCost
    residual: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, of the residual too; codebooks are not counted."""
        tensors = list(self.module.parameters()) + list(self.residual or ())
        packed = self.module.quantized.nbytes if isinstance(self.module, QuantizedLinear) else 0
        return packed + sum(tensor.nbytes for tensor in tensors)


def route_layer(
    name: str, layer: nn.Module, route: Route, original: Original | None = None
) -> RoutedLayer:
    """One layer, adapted or not, as the route writes it.

    Args:
        name: its path. layer: an AdapterLayer, a Linear or a QuantizedLinear; left as it is.
        route: the route. original: asked for `route.original`, and only for quantized layers.
    """
    adapted = layer if isinstance(layer, AdapterLayer) else _Unadapted(layer)
    quantizes = route.quantizes(name, adapted.base_layer)
    wide = torch.float32 if quantizes else comparison_dtype(route.dtype)
    exact = adapted.effective_weight(wide)
    effect = effect_of(adapted, exact)
    aim = exact
    if route.original and isinstance(adapted.base_layer, QuantizedLinear):
        assert original is not None
        with _over(adapted, original(name)):
            aim = adapted.effective_weight()
    elif wide != torch.float32:
        aim = adapted.effective_weight()
    if not quantizes:
        module, lost = rounded_layer(adapted, aim, exact, route.dtype)
        return RoutedLayer(module, LayerCost(lost, effect))
    assert route.format is not None
    weight = four_bit.quantize(aim, route.format, name=f"{name}.weight")
    weight = dataclasses.replace(weight, dtype=route.dtype)
    bias = adapted.effective_bias()
    linear = QuantizedLinear(weight, None if bias is None else bias.detach().to(route.dtype))
    missing = exact - weight.dequantize(torch.float32)
    return _with_residual(linear.eval(), missing, effect, route.residual_rank)


def _with_residual(module: nn.Module, missing: Tensor, effect: float, rank: int) -> RoutedLayer:
    lost = frobenius(missing)
    if not rank:
        return RoutedLayer(module, LayerCost(lost, effect))
    A, B = truncated_svd(missing, rank)
    rest = frobenius(missing - B @ A)
    captured = 1 - (rest / lost) ** 2 if lost else 1.0
    return RoutedLayer(module, LayerCost(rest, effect, captured), (A, B))


class _Unadapted(AdapterLayer):
    """A Linear without an adapter, seen as one whose adapter does nothing."""

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.base_weight().to(dtype)


@contextmanager
def _over(layer: AdapterLayer, weight: Tensor) -> Iterator[None]:
    """Inside the `with`, the adapter stands over this dense weight (out, in)."""
    base = layer.base_layer
    assert isinstance(base, QuantizedLinear)
    other = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    other.weight = nn.Parameter(weight.to(layer.device), requires_grad=False)
    other.register_parameter("bias", base.bias)
    layer.base_layer = other
    try:
        yield
    finally:
        layer.base_layer = base


def decode_to_float32(model: nn.Module) -> None:
    """Let quantized bases give their weights in float32, so that a route rounds once, not twice."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.dtype = torch.float32


def routed_modules(model: nn.Module, route: Route) -> dict[str, nn.Module]:
    """What the route replaces, by path: the adapted layers, and what it changes besides.

    That is the Linears that become quantized or dense, and a table that is tied to an adapted one.
    """
    adapted: dict[str, nn.Module] = dict(adapter_layers(model))
    inside = tuple(f"{name}." for name in adapted)
    held = {id(p) for layer in adapted.values() for p in layer.parameters()}
    found = dict(adapted)
    for name, module in model.named_modules():
        if name in adapted or name.startswith(inside):
            continue
        is_linear = isinstance(module, nn.Linear | QuantizedLinear)
        is_tied = any(id(p) in held for p in module.parameters(recurse=False))
        if is_tied or (is_linear and route.changes(name, module)):
            found[name] = module
    return found


def take_route(
    model: nn.Module, route: Route, original: Original | None = None
) -> tuple[dict[str, LayerCost], dict[str, tuple[Tensor, Tensor]]]:
    """Merge the adapter by this route and take its modules out, in place, layer by layer.

    Args:
        model: with an adapter.
        route: the route; all that is dense comes out in its dtype.
        original: where the weights from before quantization are; for the routes that want them.

    Returns:
        What each adapted layer lost, and the residuals (A, B), both by path.

    Raises:
        AdapterError: there is no adapter, or it is not finite. QuantizationError: a merged weight
            is not finite, and the model is then merged in part.
    """
    check_finite(model)
    costs: dict[str, LayerCost] = {}
    residuals: dict[str, tuple[Tensor, Tensor]] = {}
    adapted = set(require_adapter(model))
    others = [name for name in routed_modules(model, route) if name not in adapted]

    def merged(name: str, layer: nn.Module) -> tuple[nn.Module, float]:
        routed = route_layer(name, layer, route, original)
        if routed.residual is not None:
            residuals[name] = routed.residual
        costs[name] = routed.cost
        return routed.module, routed.cost.share

    for name in others:
        replace_module(model, name, merged(name, model.get_submodule(name))[0])
        del costs[name]
    unload_adapter(model, merge=True, how=merged)
    model.to(route.dtype)
    for module in model.modules():  # those that stay quantized are decoded to that dtype too
        if isinstance(module, QuantizedLinear):
            module.dtype = route.dtype
            if isinstance(module.quantized, FourBitTensor):
                module.quantized = dataclasses.replace(module.quantized, dtype=route.dtype)
    return costs, residuals


class _OnTheWay(nn.Module):
    """Computes as a routed layer, which is made for the call and gone after it; in float32."""

    def __init__(self, make: Callable[[], RoutedLayer]):
        super().__init__()
        self._make = make

    def forward(self, x: Tensor) -> Tensor:
        routed = self._make()
        y = routed.module.float()(x)
        if routed.residual is None:
            return y
        A, B = routed.residual
        return y + (x @ A.t()) @ B.t()


@contextmanager
def on_route(
    model: nn.Module,
    route: Route,
    original: Original | None,
    record: Callable[[str, RoutedLayer], None],
) -> Iterator[None]:
    """Inside the `with`, the model computes in float32 with the weights that the route writes.

    model: in float32, with an adapter. record: is told each layer when it computes.
    Each layer's weights are made when they are used and then forgotten. After it the model is as
    it was.
    """

    def made(name: str, module: nn.Module) -> RoutedLayer:
        routed = route_layer(name, module, route, original)
        record(name, routed)
        return routed

    replaced = routed_modules(model, route)
    others = _plain_parameters(model, replaced)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, module in replaced.items():
            lazy = _OnTheWay(partial(made, name, module))
            if isinstance(module, AdapterLayer):
                module.merged = lazy
            else:
                replace_module(model, name, lazy)
        for parameter in others:
            rounded = parameter.data.to(route.dtype).float()
            if not torch.equal(rounded, parameter.data):
                kept.append((parameter, parameter.data))
                parameter.data = rounded
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        for name, module in replaced.items():
            if isinstance(module, AdapterLayer):
                module.merged = None
            else:
                replace_module(model, name, module)


def _plain_parameters(model: nn.Module, replaced: dict[str, nn.Module]) -> list[nn.Parameter]:
    """The parameters that the route only casts: norms, the embedding, biases."""
    taken = {id(p) for module in replaced.values() for p in module.parameters()}
    return [p for p in model.parameters() if id(p) not in taken]
