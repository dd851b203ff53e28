"""The merge laboratory: what each route of merging loses, before anything is written.

Two measures, both against the unmerged adapter over the base that it was trained over, in float32:

- by layer, ||written - exact|| / ||effect||: the share of the adapter's own change of the weights
  that the route loses (routes.py). It needs no text.
- in all, on real text: KL(unmerged || merged), the mean over the tokens in nats, and how far the
  logits move, as a share of how far the adapter itself moves them.

The default is the route that loses least of those that give what is asked for: by KL in a report,
else by the share of all layers together. Among dense outputs of one dtype the two agree; elsewhere
they need not, because weights count a change in any direction: on SmolLM2 the original base is 10
times the adapter's effect away in weights and 0.18 nats in KL, requantizing 1.07 times and 0.67.

The merged logits are computed in float32 from the weights that the route writes, so what is seen
is the weights' loss and not that of computing in few bits. There is one model; each layer's routed
weights are made when the layer computes, and forgotten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lorax.adapters.attached import adapter_layers, require_adapter
from lorax.adapters.inject import disabled_adapter
from lorax.adapters.merge import gained_biases
from lorax.adapters.tables import embedding_weight
from lorax.adapters.variants import of_file
from lorax.data.docstrings import HELD_OUT_MODULES, QUESTION, pairs
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary
from lorax.errors import AdapterError, UsageError
from lorax.files import require
from lorax.formats import bitsandbytes
from lorax.formats.directory import check_free
from lorax.formats.huggingface import ModelFiles, open_model_files
from lorax.formats.instead import instead_of_adapter
from lorax.formats.json_files import read_json
from lorax.formats.open_model import open_model
from lorax.formats.peft_directory import CONFIG
from lorax.formats.places import Place, as_trained, find_place
from lorax.merging.costs import Report, RouteCost, distance, logits_cost
from lorax.merging.files import write_merged
from lorax.merging.routes import (
    DTYPES,
    LayerCost,
    Original,
    Route,
    RoutedLayer,
    decode_to_float32,
    on_route,
    route_layer,
    take_route,
)
from lorax.models import Model
from lorax.quant import codebooks
from lorax.quant.linear import QuantizedLinear

TOKENS = 1024
ROW_TOKENS = 128
RESIDUAL_RANK = 16


class Laboratory:
    """A model with its adapter, over what it was trained over, and the routes out of there.

    dtype: what dense weights are to come out in, if no route says otherwise.
    quantization: the format of the quantized weights that the adapter stands over, or None.
    original: where these weights are from before they were quantized, or None.
    """

    def __init__(self, model: Model, original: Original | None = None):
        layers = require_adapter(model)
        self.model = model
        self.original = original
        self.dtype = embedding_weight(model).dtype
        bases = [layer.base_layer for layer in layers.values()]
        formats = [b.quantized.format for b in bases if isinstance(b, QuantizedLinear)]
        self.quantization = formats[0] if formats else None
        decode_to_float32(model)

    def fitting(self, format: str | None = None, residual_rank: int = 0) -> list[Route]:
        """The routes that give what is asked for: dense in `dtype`, or a 4-bit format.

        Raises:
            UsageError: no such format, or a residual for a dense model.
        """
        if format is not None:
            written = codebooks.formats(bitsandbytes=True)  # the layout that a 4-bit model takes
            if format not in written:
                raise UsageError(f"format {format!r}: expected one of {', '.join(written)}")
            return [Route(self.dtype, format=format, residual_rank=residual_rank)]
        if residual_rank:
            raise UsageError("--residual-rank goes with a 4-bit output: add --format nf4-dq")
        dense = [Route(self.dtype)]
        return dense if self.original is None else [*dense, Route(self.dtype, original=True)]

    def requested(
        self, route: str | None = None, format: str | None = None, residual_rank: int = 0
    ) -> list[Route]:
        """The routes to choose from: the one of that name, or all that fit.

        Raises:
            UsageError: no such route or format, one that has nowhere to start here, or a residual
                for a dense model.
        """
        if route is None:
            return self.fitting(format, residual_rank)
        found = Route.parse(route, self.dtype)
        self.check(found)
        return [found]

    def routes(self, residual_rank: int = 0, also: Sequence[Route] = ()) -> list[Route]:
        """The routes that a report compares, and those that were asked for."""
        dense = [Route(dtype) for dtype in DTYPES.values()]
        if self.original is not None:
            wanted = dict.fromkeys((torch.float32, self.dtype))
            dense += [Route(dtype, original=True) for dtype in wanted]
        mine = self.quantization if self.quantization in codebooks.formats() else None
        formats = [mine] if mine else ["nf4", "nf4-dq"]
        rank = residual_rank or RESIDUAL_RANK
        left = Route(self.dtype, format=formats[-1], residual_rank=rank)
        quantized = [Route(self.dtype, format=f) for f in formats]
        return list(dict.fromkeys([*dense, *quantized, left, *also]))

    def check(self, route: Route) -> None:
        """Refuse a route that asks for weights from before quantization where there are none."""
        if route.original and self.original is None:
            why = "is not quantized" if self.quantization is None else "was read in its few bits"
            raise UsageError(
                f"route {route.name}: the base {why}; take {Route(route.dtype).name}"
                + ("" if self.quantization is None else ", or give the original with --original")
            )

    def weigh(self, route: Route) -> RouteCost:
        """What a route costs by layer; one layer at a time, and no text."""
        self.check(route)
        layers = adapter_layers(self.model)
        costs = {n: route_layer(n, m, route, self.original).cost for n, m in layers.items()}
        return RouteCost(route, costs)

    def choose(self, routes: Sequence[Route], report: Report | None = None) -> RouteCost:
        """The route that loses least of the adapter; the first of equals.

        report: what has been measured already.

        Raises:
            AdapterError: the merged weights are not finite, in a dtype of too small a range.
        """
        known = {cost.route: cost for cost in report.routes} if report else {}
        costs = [known.get(route) or self.weigh(route) for route in routes]
        best = min(costs, key=lambda cost: cost.loss)
        if not math.isfinite(best.share):
            raise AdapterError(
                f"route {best.route.name}: {best.worst[0]} is not finite when merged; take a dtype "
                "of a larger range, such as bfloat16"
            )
        return best

    @torch.no_grad()
    def compare(
        self,
        routes: Sequence[Route],
        ids: Tensor,
        progress: Callable[[str], None] = lambda name: None,
    ) -> Report:
        """Measure routes by layer and on text.

        routes: each measured by itself, one after the other.
        ids: (rows, T) int64. progress: is told each route's name before it is measured.

        The model is in float32 afterwards, and else as it was.
        """
        for route in routes:
            self.check(route)
        self.model.float().eval()
        ids = ids.to(embedding_weight(self.model).device)
        progress("the adapter itself")
        unmerged = self.model(ids)  # (rows, T, V)
        with disabled_adapter(self.model):
            base = self.model(ids)
        effect = distance(base, unmerged)
        adapter = logits_cost(unmerged, base, effect)
        del base
        costs = []
        for route in routes:
            progress(route.name)
            costs.append(self._measure(route, ids, unmerged, effect))
        return Report(ids.numel(), costs, adapter)

    def _measure(self, route: Route, ids: Tensor, unmerged: Tensor, effect: float) -> RouteCost:
        adapted = adapter_layers(self.model)
        costs: dict[str, LayerCost] = {}
        sizes: dict[str, int] = {}

        def record(name: str, routed: RoutedLayer) -> None:
            sizes[name] = routed.nbytes
            if name in adapted:
                costs[name] = routed.cost

        with on_route(self.model, route, self.original, record):
            merged = self.model(ids)
        layers = {name: costs[name] for name in adapted}  # in the model's order
        nbytes = sum(sizes.values()) + _rest_bytes(self.model, set(sizes), route)
        return RouteCost(route, layers, nbytes, logits_cost(unmerged, merged, effect))

    def check_tokens(self, ids: Tensor, tokenizer: Tokenizer) -> None:
        """Refuse a text with a token that the model's embedding does not have."""
        rows = embedding_weight(self.model).shape[0]
        check_vocabulary(ids.flatten().tolist(), rows, tokenizer)

    def write(self, route: Route, path: Path, tokenizer: Tokenizer | None) -> RouteCost:
        """Merge by this route and write the model; the laboratory is used up."""
        self.check(route)
        costs, residuals = take_route(self.model, route, self.original)
        write_merged(self.model, path, tokenizer, residuals)
        return RouteCost(route, costs)


def check_request(
    output: Path | None,
    report: bool,
    route: str | None,
    format: str | None,
    residual_rank: int,
    text: Path | None = None,
) -> None:
    """Refuse what cannot be done, before anything is loaded.

    Raises:
        UsageError: nothing to write and no report, a text and no report, a path that is taken, an
            unknown route, or a route together with the options that choose one.
    """
    if text is not None and not report:
        raise UsageError(f"--text {text} is what --report measures on; give --report, too")
    if output is None and not report:
        raise UsageError("give a directory to write, or --report to compare the routes alone")
    if output is not None:
        check_free(output)
    if route is not None:
        Route.parse(route, torch.float32)
        if format is not None or residual_rank:
            raise UsageError(f"--route {route} says it all; leave --format and --residual-rank out")
    if residual_rank < 0:
        raise UsageError(f"--residual-rank {residual_rank}: expected 0 or more")


def open_laboratory(
    adapter: str,
    base: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    original: str | None = None,
    check_base: bool = True,
    say: Callable[[str], None] = lambda line: None,
    resize_vocabulary: bool = False,
) -> tuple[Laboratory, Tokenizer]:
    """Load an adapter over the base that it was trained over.

    Args:
        adapter: its directory or Hub id, or a run's directory.
        base: the base, where the adapter's own entry does not lead to it.
        dtype, quantization: of the base in training, as in `open_model`.
        device: where to work.
        original: a model with the weights from before quantization; if not given, the base's own
            files, unless these are quantized.
        check_base, resize_vocabulary: as in `load_adapter`.
        say: is told in one line what the run has on record.

    Raises:
        AdapterError: a prompt, or a bias, which no weights can hold. UsageError: `original` is
            another kind of model, or quantized too. And all that `open_model` raises.
    """
    place = find_place(adapter, base)
    _refuse_what_is_not_merged(place, adapter)
    dtype, quantization = as_trained(place, dtype, quantization, say)
    model, tokenizer = open_model(
        place.adapter or adapter,
        place.model,
        dtype=dtype,
        device=device,
        quantization=quantization or "none",
        check_base=check_base,
        resize_vocabulary=resize_vocabulary,
    )
    gained_biases(model, require_adapter(model))  # what cannot be written is not compared either
    return Laboratory(model, _original(model, original)), tokenizer


def _refuse_what_is_not_merged(place: Place, path: str) -> None:
    if place.adapter is None:
        raise UsageError(
            f"{path}: no {CONFIG} there; expected an adapter's directory; "
            f"{instead_of_adapter(Path(path).expanduser())}"
        )
    variant = of_file(read_json(place.adapter / CONFIG))
    if variant is not None and variant.no_merge:
        raise AdapterError(
            f"{place.adapter / CONFIG}: peft_type {variant.peft_type}: {variant.no_merge}"
        )


def _original(model: Model, path: str | None) -> Original | None:
    """Where the quantized Linears' weights are from before; None where nothing is quantized."""
    quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
    if not quantized:
        if path is not None:
            raise UsageError(
                f"--original {path}: the base is not quantized; it is its own original; "
                "leave --original out"
            )
        return None
    files = open_model_files(path or model.name_or_path)
    if isinstance(files.source, bitsandbytes.QuantizedFiles):
        if path is not None:
            raise UsageError(
                f"--original {path}: is quantized too; give the model that was quantized"
            )
        return None
    config = dataclasses.replace(files.model.config, vocab_size=model.config.vocab_size)
    if config != model.config:  # a resized vocabulary is no other model
        raise UsageError(
            f"--original {path}: its config.json is that of another model; give the one that was "
            "quantized"
        )
    return partial(_read, files)


def _read(files: ModelFiles, name: str) -> Tensor:
    return files.read(f"{name}.weight").clone()


def sample(
    tokenizer: Tokenizer, max_positions: int, text: Path | None = None, tokens: int = TOKENS
) -> Tensor:
    """Rows of real text to measure on: (rows, T) int64, T at most ROW_TOKENS.

    text: a file; if not given, questions about Python's library and the docstrings' answers.

    Raises:
        EnvironmentProblem: no such file. UsageError: it is no text, or has less than two tokens.
    """
    if text is None:
        found = pairs(HELD_OUT_MODULES)
        written = "\n\n".join(f"{QUESTION.format(name=n)}\n{answer}" for n, answer in found)
    else:
        text = require(text)
        try:
            written = text.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{text}: cannot be read as text ({error}); give a file of UTF-8 text"
            ) from None
    start = tokenizer.encode("")  # a bos token, where the tokenizer sets one
    width = min(ROW_TOKENS, max_positions, max(tokens, len(start) + 1))
    step = width - len(start)
    # A token is seldom more than eight characters: the rest of a long file is not looked at.
    ids = tokenizer.encode(written[: 64 * tokens], add_special_tokens=False)
    step = min(step, len(ids))
    if step < 1:
        raise UsageError(f"{text}: holds no text to measure on; give a longer one")
    rows = [ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor([[*start, *row] for row in rows[: max(1, tokens // width)]])


def _rest_bytes(model: nn.Module, replaced: set[str], route: Route) -> int:
    """Bytes of what the route only casts or leaves alone; a tied head is counted once."""
    inside = tuple(f"{name}." for name in replaced)
    plain = {id(p): p for n, p in model.named_parameters() if not n.startswith(inside)}
    total = sum(p.numel() for p in plain.values()) * route.dtype.itemsize
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and not f"{name}.".startswith(inside):
            total += module.quantized.nbytes
    return total
