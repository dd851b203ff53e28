"""Before anything imports triton: without a GPU its kernels run in the interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def guard():
    """Allocates buffers with canaries around them, for the test and for the kernels it calls."""
    from kernel_testing import guarded

    with guarded() as allocator:
        yield allocator


@pytest.fixture
def r9():
    """Gathers results; at the test's end their errors are held to R9's bound."""
    from kernel_testing import WithinR9

    collected = WithinR9()
    yield collected
    collected.check()
