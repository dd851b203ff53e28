"""Many small tensors as one flat one: how an optimizer's states lie in memory, and how it steps.

A LoRA of SmolLM2 has 420 tensors of 12,000 values. Stepping them one by one costs 8 calls each, and
the calls, not the numbers, take the time (18 ms of which 5 are arithmetic). So the states of many
parameters lie side by side in a *page*, and a page is stepped as one flat tensor:

    parameters   [A0] [B0] [A1] [B1]   ...        where the model keeps them
                   |    |    |    |    copied in, 2 calls
    scratch p    | A0 | B0  | A1 | B1|            two buffers for all pages; they stay in the cache
    scratch g    | gradients likewise|
    exp_avg      | A0 | B0  | A1 | B1|            the page's own, a stretch of one flat allocation
    exp_avg_sq   | A0 | B0  | A1 | B1|
                   |    |    |    |    p copied back, 1 call

A page holds parameters of one group, dtype and device. A tensor larger than a page has one to
itself and passes through the scratch in tiles. Where some parameters have no gradient, or have
taken fewer steps than others, those of the page are stepped one by one. Element-wise arithmetic
does not depend on where an element stands, so none of this changes a bit (tests hold it).

That is how PyTorch steps a page. A kernel needs no scratch: `fused.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorax.errors import UsageError
from lorax.kernels.hyper import AdamWStep

PAGE_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}  # measured on a CPU: 2^16 10.0 ms, 2^18 8.6, 2^19 8.1
ALIGNMENT = 256  # bytes, for each buffer of a page


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of one AdamW step; `step` counts from 1."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @staticmethod
    def of(group: Mapping[str, Any], step: int) -> Hyperparameters:
        """Hyperparameters of a `param_group` at step `step` (1-based)."""
        beta1, beta2 = group["betas"]
        return Hyperparameters(
            step,
            float(group["lr"]),
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            bool(group["maximize"]),
        )


class Moments(ABC):
    """Adam's two moments of a page's elements, in one number format.

    align: each parameter starts at a multiple of this many elements.
    kind: moments with equal `kind` may share a kernel launch.
    """

    align: int
    kind: tuple[Any, ...]

    @abstractmethod
    def nbytes(self, elements: int) -> int:
        """Bytes needed for `elements` elements."""

    @abstractmethod
    def bind(self, memory: Tensor, elements: int) -> None:
        """Place the moments in `memory`, (nbytes,) uint8, zeroed."""

    @abstractmethod
    def state(self, start: int, shape: torch.Size) -> dict[str, Tensor]:
        """State tensors by name of the parameter of `shape` at element `start`: views."""

    @abstractmethod
    def read(self, start: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq of that parameter, decoded to floats, in its shape."""

    @abstractmethod
    def step_(self, p: Tensor, g: Tensor, start: int, hyper: Hyperparameters) -> None:
        """One AdamW step in place of elements start ... start + n; p and g are (n,)."""

    @abstractmethod
    def launch(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        steps: Sequence[AdamWStep],
        factor: Tensor | None = None,
    ) -> None:
        """One AdamW step of whole parameters in one Triton launch; lists have equal length.

        factor: () float32 that the gradients are multiplied by.
        """


class Scratch:
    """Two flat buffers per dtype and device, for copies of a page's parameters and gradients.

    Allocated at the first step in PyTorch and kept: 2 MiB on a CPU, 32 MiB on a GPU, in float32.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def of(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(2, page elements): row 0 for parameters, row 1 for gradients."""
        key = (dtype, device)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(2, page_elements(device), dtype=dtype, device=device)
        return self._buffers[key]


class Page:
    """Parameters whose moments lie side by side and are stepped together.

    Args:
        parameters: of one dtype and device.
        group: the index of their parameter group.
        moments: storage of the moments, in their number format.
        scratch: flat buffers for a step in PyTorch.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: int, moments: Moments, scratch: Scratch
    ):
        self.parameters = list(parameters)
        self.group = group
        self.moments = moments
        self.steps = torch.zeros(len(self.parameters))  # float32 as torch's
        self.starts = [0]
        for p in self.parameters:
            self.starts.append(self.starts[-1] + round_up(p.numel(), moments.align))
        self.elements = self.starts[-1]
        self.nbytes = moments.nbytes(self.elements)
        self._buffers = scratch
        self._alone = self.elements > page_elements(self.parameters[0].device)

    def bind(self, memory: Tensor) -> None:
        """Set the page's memory, (nbytes,) uint8, zeroed."""
        self.memory = memory
        self.moments.bind(memory, self.elements)
        self._states = []
        for step, start, p in zip(self.steps, self.starts, self.parameters, strict=False):
            state = {"step": step, **self.moments.state(start, p.shape)}
            self._states.append({name: apart(view) for name, view in state.items()})

    def state(self, index: int) -> dict[str, Tensor]:
        """A parameter's state by torch's names; views of the page, each with its own storage."""
        return dict(self._states[index])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq of a parameter, as floats."""
        return self.moments.read(self.starts[index], self.parameters[index].shape)

    def advance(self) -> list[tuple[int, int]]:
        """Increment `step` of each parameter with a gradient; return [(index, step)]."""
        ready = torch.tensor([p.grad is not None for p in self.parameters])
        self.steps += ready
        pairs = enumerate(zip(ready.tolist(), self.steps.tolist(), strict=True))
        return [(index, int(step)) for index, (there, step) in pairs if there]

    def step(self, group: Mapping[str, Any], factor: Tensor | None = None) -> None:
        """Step every parameter of the page that has a gradient, in PyTorch.

        factor: () that the gradients are multiplied by, in place. This waits for the device: where
            it is no finite number, nothing is changed.
        """
        if factor is not None:
            if not factor.isfinite():
                return
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
        for first, last in self._runs():
            self.steps[first:last] += 1
            hyper = Hyperparameters.of(group, int(self.steps[first]))
            if self._alone:
                self._step_tiles(hyper)
            else:
                self._step_together(first, last, hyper)

    def _runs(self) -> list[tuple[int, int]]:
        """Ranges [first, last) of parameters with gradients and the same step number."""
        ready = [p.grad is not None for p in self.parameters]
        if all(ready) and bool((self.steps == self.steps[0]).all()):
            return [(0, len(ready))]
        return [(i, i + 1) for i, there in enumerate(ready) if there]

    def _step_together(self, first: int, last: int, hyper: Hyperparameters) -> None:
        start, stop = self.starts[first], self.starts[last]
        parameters: list[Tensor] = list(self.parameters[first:last])
        gradients = [p.grad for p in parameters if p.grad is not None]
        p_views = self._p_views[first:last]
        torch._foreach_copy_(p_views, parameters)
        torch._foreach_copy_(self._g_views[first:last], gradients)
        if self._gaps:
            torch._foreach_zero_(self._gaps)
        p, g = self._scratch[:, start:stop]
        self.moments.step_(p, g, start, hyper)
        torch._foreach_copy_(parameters, p_views)

    def _step_tiles(self, hyper: Hyperparameters) -> None:
        (parameter,) = self.parameters
        assert parameter.grad is not None
        flat, grad = parameter.reshape(-1), parameter.grad.reshape(-1)
        width = self._scratch.shape[1]
        for start in range(0, flat.numel(), width):
            n = min(width, flat.numel() - start)
            p, g = self._scratch[:, : round_up(n, self.moments.align)]
            p[:n].copy_(flat[start : start + n])
            g[:n].copy_(grad[start : start + n])
            g[n:].zero_()
            self.moments.step_(p, g, start, hyper)
            flat[start : start + n].copy_(p[:n])
        if not parameter.is_contiguous():
            parameter.copy_(flat.view(parameter.shape))

    @cached_property
    def _scratch(self) -> Tensor:
        """(2, page elements) of `state_dtype`: row 0 for parameters, row 1 for gradients."""
        first = self.parameters[0]
        return self._buffers.of(state_dtype(first), first.device)

    @cached_property
    def _p_views(self) -> list[Tensor]:
        return self._views(self._scratch[0])

    @cached_property
    def _g_views(self) -> list[Tensor]:
        return self._views(self._scratch[1])

    @cached_property
    def _gaps(self) -> list[Tensor]:
        """Padding between parameters, as views; must be zero, or it would enter blocks' absmax."""
        buffer = self._scratch[1]
        ends = [start + p.numel() for start, p in zip(self.starts, self.parameters, strict=False)]
        pairs = zip(ends, self.starts[1:], strict=True)
        return [buffer[end:start] for end, start in pairs if end < start]

    def _views(self, buffer: Tensor) -> list[Tensor]:
        starts = zip(self.starts, self.parameters, strict=False)
        return [buffer[start : start + p.numel()].view(p.shape) for start, p in starts]


def page_elements(device: torch.device) -> int:
    """Maximum elements of a page: what fits a CPU's cache, or fills a GPU."""
    return PAGE_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]


def state_dtype(parameter: Tensor) -> torch.dtype:
    """The step's compute dtype: float32, or float64 for float64 parameters."""
    return torch.promote_types(parameter.dtype, torch.float32)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def apart(view: Tensor) -> Tensor:
    """A tensor on a contiguous view's memory whose storage is exactly that view.

    torch.save and safetensors write storages, not views: for a plain view they would write the
    whole page, and they refuse a storage that is used as bytes and as float32.
    """
    start = view.storage_offset() * view.itemsize
    own = view.untyped_storage()[start : start + view.nbytes]  # keeps the page alive, copies none
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(
        own, 0, view.shape, view.stride()
    )


def carve(memory: Tensor, start: int, dtype: torch.dtype, elements: int) -> tuple[Tensor, int]:
    """View `elements` values of `dtype` from byte `start`; also return the next aligned offset."""
    stop = start + elements * dtype.itemsize
    return memory[start:stop].view(dtype), round_up(stop, ALIGNMENT)


def fill_pages(
    parameters: Iterable[nn.Parameter], most: int, align: int
) -> Iterator[list[nn.Parameter]]:
    """Split parameters in order into pages of at most `most` elements, or one larger tensor."""
    page: list[nn.Parameter] = []
    filled = 0
    for p in parameters:
        size = round_up(p.numel(), align)
        if page and filled + size > most:
            yield page
            page, filled = [], 0
        page.append(p)
        filled += size
    if page:
        yield page


def check_parameter(parameter: nn.Parameter) -> None:
    """Check that a parameter can be stepped on flat float memory.

    Raises:
        UsageError: the parameter is not floating point, or its gradient is sparse.
    """
    if not parameter.is_floating_point():
        raise UsageError(
            f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; "
            "lorax's optimizers step floating-point parameters only; leave it out of the groups"
        )
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise UsageError(
            f"a parameter of shape {tuple(parameter.shape)} has a gradient of layout "
            f"{parameter.grad.layout}; use a dense gradient (Embedding(sparse=False))"
        )
