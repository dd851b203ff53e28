"""Every operator that lorax registers, through torch's own test of operators: opcheck.

It holds the schema (nothing is changed or aliased that is not declared), the fake twin (shapes,
dtypes, strides), and the gradient under torch.compile's tracing with shapes that vary.
"""

import pytest
import torch
from torch.library import opcheck

from lorax.kernels.hyper import AdamWStep
from lorax.quant import ops, traced  # noqa: F401 - registers
from lorax.quant.codebooks import dynamic_map
from lorax.quant.formats import FORMATS, quantize


def weight_4bit(format):
    return tuple(quantize(torch.randn(24, 64), format).operands())


def x(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def parts(format):
    q = quantize(torch.randn(24, 64), format)
    return list(q.tensors()), q.format, [getattr(q, "block_size", 0), 24, 64]


def step_numbers(count):
    return [float(v) for _ in range(count) for v in AdamWStep.at(1, 1e-3, 0.9, 0.999, 1e-8, 0.01)]


def tables(count, size=512):
    codes = [torch.full((size,), 127, dtype=torch.uint8) for _ in range(count)]
    return codes, [torch.zeros(size // 256) for _ in range(count)]


def samples():
    """(operator, arguments), several for each."""
    code = weight_4bit("nf4")[2]
    for format in ("nf4", "nf4-dq", "fp4-dq"):
        w = weight_4bit(format)
        w8 = (*w, *[None] * (8 - len(w)))
        yield "dequantize_4bit", (*w8, torch.bfloat16)
        yield "matmul_4bit", (x(3, 5, 64), None, *w)
        yield "matmul_4bit", (x(7, 64), torch.randn(24), *w)
        yield "matmul_4bit_dx", (x(7, 24, grad=False), *w)
        A, B = x(4, 64), x(24, 4)
        yield "lora_linear_4bit", (x(7, 64), A, B, 2.0, torch.randn(24), *w)
        a, b = A.detach(), B.detach()
        yield (
            "lora_linear_4bit_backward",
            (x(7, 24, grad=False), x(7, 64, grad=False), x(7, 4, grad=False), a, b, 2.0, *w),
        )
    for values in (torch.randn(300), torch.randn(6, 64), torch.randn(65).bfloat16()):
        yield "quantize_4bit", (values, code, 64)
        yield "quantize_8bit", (values, dynamic_map().float(), 64)
    for format in FORMATS:
        yield "frozen_linear", (x(2, 3, 64), None, *parts(format))
        yield "frozen_linear", (x(9, 64), x(24), *parts(format))
        yield "frozen_linear", (x(4, 64, grad=False), torch.randn(24), *parts(format))
        yield "frozen_linear_dx", (x(9, 24, grad=False), *parts(format))
    targets = torch.tensor([1, -100, 5, 0, 9, 2])
    for gradient in (True, False):
        hidden, head = x(6, 16, grad=gradient), torch.randn(12, 16)
        yield "cross_entropy_frozen_head", (hidden, head, targets, gradient)
    for count in (1, 3):
        tensors = [[torch.randn(8, 64) for _ in range(count)] for _ in range(2)]
        moments = [[torch.zeros(8, 64) for _ in range(count)] for _ in range(2)]
        yield "adamw_", (*tensors, *moments, step_numbers(count))
        maps = dynamic_map().float(), dynamic_map(signed=False).float()
        states = (*tables(count), *tables(count))
        yield "adamw_8bit_", (*tensors, *states, step_numbers(count), *maps, 256)


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
