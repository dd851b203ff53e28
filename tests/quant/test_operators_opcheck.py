"""Every operator that lorax registers, through torch's own test of operators: opcheck.

It holds the schema (nothing is changed or aliased that is not declared), the fake twin (shapes,
dtypes, strides), and the gradient under torch.compile's tracing with shapes that vary.
"""

import pytest
import torch
from torch.library import opcheck

from lorax.quant import names, ops, traced  # noqa: F401 - registers
from lorax.quant.quantize import quantize
from lorax.training import fused_loss  # noqa: F401 - registers


def weight_4bit(format):
    return tuple(quantize(torch.randn(24, 64), format).operands())


def x(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def parts(format):
    q = quantize(torch.randn(24, 64), format)
    return list(q.tensors()), q.format, [getattr(q, "block_size", 0), 24, 64]


def samples():
    """(operator, arguments), several for each."""
    for format in ("nf4", "nf4-dq", "fp4-dq"):
        w = weight_4bit(format)
        yield "matmul_4bit", (x(3, 5, 64), None, *w)
        yield "matmul_4bit", (x(7, 64), torch.randn(24), *w)
        yield "matmul_4bit_dx", (x(7, 24, grad=False), *w)
        A, B = x(4, 64), x(24, 4)
        yield "lora_linear_4bit", (x(7, 64), A, B, 2.0, torch.randn(24), *w)
        a, b = A.detach(), B.detach()
        tensors = x(7, 24, grad=False), x(7, 64, grad=False), x(7, 4, grad=False), a, b
        yield "lora_linear_4bit_backward", (*tensors, 2.0, True, *w)
        yield "lora_linear_4bit_backward", (*tensors, 2.0, False, *w)
    for format in names.formats():
        yield "frozen_linear", (x(2, 3, 64), None, *parts(format))
        yield "frozen_linear", (x(9, 64), x(24), *parts(format))
        yield "frozen_linear", (x(4, 64, grad=False), torch.randn(24), *parts(format))
        yield "frozen_linear_dx", (x(9, 24, grad=False), *parts(format))
    targets = torch.tensor([1, -100, 5, 0, 9, 2])
    for gradient in (True, False):
        hidden, head = x(6, 16, grad=gradient), torch.randn(12, 16)
        yield "cross_entropy_frozen_head", (hidden, head, targets, gradient)


SAMPLES = [(name, i) for i, (name, _) in enumerate(samples())]


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_opcheck(name, number):
    arguments = list(samples())[number][1]
    opcheck(getattr(torch.ops.lorax, name).default, arguments)


def test_every_operator_has_samples():
    registered = {
        name.removeprefix("lorax::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lorax::")
    }
    assert registered == {name for name, _ in SAMPLES}
