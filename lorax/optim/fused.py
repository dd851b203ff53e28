"""Many tensors in one launch: lorax.kernels.adamw behind the optimizers.

    on a CPU     PyTorch, page by page through two flat buffers (`flat.py`)
    on CUDA      a Triton kernel, which finds parameters, gradients and moments by their addresses:
                 ordinary memory  one launch for all tensors of a dtype and kind of moments
                 paged memory     one launch a page, while the next page is on its way

`lorax.backend.backend` and LORAX_KERNELS force either; a group's `fused=False` keeps to PyTorch.
The moments lie in the same pages either way, under the same names, so a run may change sides.

**Which bits.** The kernel rounds where `adamw_` rounds on a CPU: the moments are bit-equal to it,
in float32 and in 8 bits (codes and scales). The parameters part by an ulp of single steps, because
the square root of torch's CPU build (MKL) is an ulp off for a fifth of all numbers, where the
kernel's is rounded right; with a right root there, all bits are equal (tests hold both).

torch's own CUDA operations round elsewhere again. Only they can be bit-equal to
`torch.optim.AdamW(foreach=False)` on the same GPU: `fused=False` runs them, in its order. It is not
the default, because it takes some ten launches a page and three copies where the kernel takes one
launch and none, for bits that no other machine has either.

float64 parameters, and gradients of another dtype than their parameter's, stay with PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorax.backend import uses_triton
from lorax.kernels.hyper import AdamWStep
from lorax.optim.flat import Hyperparameters, Moments, Page

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_kernel(page: Page, group: Mapping[str, Any]) -> bool:
    """Whether the Triton kernel steps a page of this `param_group`; otherwise PyTorch does."""
    first = page.parameters[0]
    return (
        group["fused"] is not False
        and first.dtype in KERNEL_DTYPES
        and uses_triton(first)
        and all(p.grad is None or p.grad.dtype == p.dtype for p in page.parameters)
    )


@dataclass
class Batch:
    """The arguments of one launch: entry i of each list belongs to parameter i."""

    moments: Moments
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[AdamWStep] = field(default_factory=list)


class Launches:
    """Collects pages and steps them with one launch per dtype, device and kind of moments.

    factor: () float32 that all gradients are multiplied by, or None; see clip.py.
    """

    def __init__(self, factor: Tensor | None = None) -> None:
        self._factor = factor
        self._batches: dict[Any, Batch] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []

    def add(self, page: Page, group: Mapping[str, Any]) -> None:
        """Add a page's parameters with gradients to the next launch."""
        first = page.parameters[0]
        key = (page.moments.kind, first.dtype, first.device)
        batch = self._batches.setdefault(key, Batch(page.moments))
        at: dict[int, AdamWStep] = {}  # most parameters are at the same step
        for index, step in page.advance():
            if step not in at:
                at[step] = kernel_step(Hyperparameters.of(group, step))
            batch.steps.append(at[step])
            batch.params.append(self._contiguous(page.parameters[index]))
            batch.grads.append(_gradient(page.parameters[index], bool(group["maximize"])))
            batch.states.append(page.state(index))

    def start(self) -> None:
        """Launch the steps of everything added, and clear the collection."""
        for batch in self._batches.values():
            columns = batch.params, batch.grads, batch.states, batch.steps
            batch.moments.launch(*columns, self._factor)
        for parameter, copy in self._copies:
            parameter.copy_(copy)
        self._batches.clear()
        self._copies.clear()

    def _contiguous(self, parameter: Tensor) -> Tensor:
        """The parameter, or a contiguous copy that is written back after the launch."""
        if parameter.is_contiguous():
            return parameter
        self._copies.append((parameter, parameter.contiguous()))
        return self._copies[-1][1]


def kernel_step(hyper: Hyperparameters) -> AdamWStep:
    """Precompute the scalar coefficients of one AdamW step."""
    return AdamWStep.at(
        hyper.step, hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay
    )


def _gradient(parameter: Tensor, maximize: bool) -> Tensor:
    assert parameter.grad is not None
    gradient = parameter.grad.contiguous()
    return -gradient if maximize else gradient
