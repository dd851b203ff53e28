"""Which program computes: plain PyTorch, Triton, or a decoder compiled for the CPU.

    name        tensors on a CPU                       tensors on CUDA
    auto        PyTorch; generation by native.c        Triton, lorax.kernels
    pytorch     PyTorch                                PyTorch
    triton      Triton's interpreter (for tests)       Triton
    compiled    PyTorch, 4-bit decoding compiled       Triton

`with backend("pytorch"):` chooses inside and for its backward; LORAX_KERNELS=pytorch in the
environment for the process. Triton is imported when the first kernel runs, never earlier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from lorax.errors import EnvironmentProblem, UsageError

BACKENDS = ("auto", "pytorch", "triton", "compiled")
_forced: ContextVar[str | None] = ContextVar("lorax_kernels", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose one of BACKENDS for the calls inside; "compiled" takes some seconds at first.

    Raises:
        UsageError: another name.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; expected one of {BACKENDS}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the choice made here: on CUDA a backward runs in a thread of its own."""
    if torch.compiler.is_compiling() or _forced.get() is None:
        return function
    here = copy_context()
    return lambda *inputs: here.copy().run(function, *inputs)


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton computes with this tensor: on CUDA, or where that is forced.

    Raises:
        EnvironmentProblem: Triton is forced for a tensor that is not on CUDA, uninterpreted.
        UsageError: LORAX_KERNELS holds an unknown name.
    """
    name = chosen()
    if name in ("auto", "compiled"):
        return tensor.is_cuda
    if name == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise EnvironmentProblem(
            f"Triton kernels were asked for, but the tensors are on {tensor.device}; "
            "move them to CUDA, or set TRITON_INTERPRET=1 before Python starts"
        )
    return name == "triton"


def uses_compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled decoder writes this tensor: on a CPU, where it is asked for."""
    return chosen() == "compiled" and tensor.device.type == "cpu"


def kernels_for(tensor: torch.Tensor, name: str) -> ModuleType:
    """lorax.kernels.`name` if Triton computes with this tensor, else kernels/reference.py.

    lorax's layers call operators for CUDA tensors only. An operator called with CPU tensors (by a
    test or torch.compile) runs the slow twin, which needs no Triton.
    """
    return import_module(f"lorax.kernels.{name if uses_triton(tensor) else 'reference'}")


def chosen() -> str:
    """One of BACKENDS."""
    name = _forced.get() or os.environ.get("LORAX_KERNELS", "auto")
    if name not in BACKENDS:
        raise UsageError(f"LORAX_KERNELS={name!r} is unknown; expected one of {BACKENDS}")
    return name
