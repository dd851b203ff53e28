"""Layers, adapter and loss through the Triton operators, as on CUDA, against the plain way."""

import re
from pathlib import Path

import pytest
import torch
from kernel_testing import DEVICE  # first: it makes lorax.kernels importable on a bare machine
from torch import nn

import lorax
from lorax.adapters.loftq import LoftQLinear
from lorax.adapters.lora import LoRALinear
from lorax.adapters.pissa import ResidualLoRALinear
from lorax.backend import backend
from lorax.quant.linear import QuantizedLinear
from lorax.training.loss import head_loss

FORMATS = ("nf4", "nf4-dq", "fp4-dq")


def randn(*shape):
    """On the GPU where there is one: there backend("triton") refuses CPU tensors."""
    return torch.randn(*shape, device=DEVICE)


def both(call, *inputs):
    """(result, gradients of the inputs) in PyTorch and in Triton."""
    found = []
    for name in ("pytorch", "triton"):
        given = [t.detach().clone().requires_grad_() for t in inputs]
        with backend(name):
            result = call(*given)
            result.float().square().sum().backward()
        found.append((result.detach(), [t.grad for t in given]))
    return found


def close(a, b):
    return (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_into_a_buffer_is_bit_equal(format, dtype):
    q = lorax.quantize(randn(24, 96), format)
    out = torch.full((24, 96), float("nan"), dtype=dtype, device=DEVICE)
    with backend("triton"):
        assert q.dequantize(out=out) is out
    assert torch.equal(out, q.dequantize(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5])
def test_quantized_linear(format, rows):
    layer = QuantizedLinear(lorax.quantize(randn(24, 128), format), randn(24))
    (one, (dx1,)), (two, (dx2,)) = both(layer, randn(2, rows, 128))
    assert close(two, one)
    assert close(dx2, dx1)


def started(format, kind):
    """A layer of each kind whose base and path are one operator on CUDA."""
    weight, bias = randn(24, 128), randn(24)
    if kind == "loftq":
        base = nn.Linear(128, 24, device=DEVICE)
        base.weight.data, base.bias.data = weight, bias
        layer = LoftQLinear(base, 4, 0.5, 0.1, iterations=1, format=format)
        layer.requires_grad_(False)
    else:
        base = QuantizedLinear(lorax.quantize(weight, format), bias)
        layer = (LoRALinear if kind is True else ResidualLoRALinear)(base, 4, 0.5, 0.1)
    layer.initialize(kind)
    for tensor in layer.tensors().values():
        tensor.data.add_(torch.randn_like(tensor))
        tensor.requires_grad_()
    return layer.eval()


CASES = [(format, True) for format in FORMATS] + [("nf4", "pissa"), ("nf4", "loftq")]


@pytest.mark.parametrize(("format", "kind"), CASES)
def test_lora_linear_with_every_gradient_by_name(format, kind):
    layer = started(format, kind)
    found = {}
    x = randn(2, 3, 128)
    for name in ("pytorch", "triton"):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        with backend(name):
            y = layer(given)
            y.square().sum().backward()
        found[name] = {
            "y": y.detach(),
            "x": given.grad,
            "lora_A": layer.lora_A.grad.clone(),
            "lora_B": layer.lora_B.grad.clone(),
        }
    for name, expected in found["pytorch"].items():
        assert close(found["triton"][name], expected), name


def test_dropout_at_work_takes_the_plain_way():
    layer = LoRALinear(QuantizedLinear(lorax.quantize(randn(8, 64), "nf4")), 2, 1.0, 0.5)
    layer.lora_B.data.normal_()
    layer.lora_A.data.normal_()
    x = randn(4, 64)
    with backend("triton"):
        assert not torch.equal(layer.train()(x), layer.eval()(x))


def test_loss_over_a_frozen_head():
    head = nn.Linear(32, 97, bias=False, device=DEVICE).requires_grad_(False)
    targets = torch.randint(0, 97, (7,), device=DEVICE)
    (one, (dx1,)), (two, (dx2,)) = both(lambda h: head_loss(h, head, targets), randn(7, 32))
    assert close(two, one)
    assert close(dx2, dx1)


def test_every_tensor_lies_where_the_kernels_run():
    """With CUDA a CPU tensor under backend("triton") is an error, which no CPU machine sees."""
    makers = re.compile(r"(?:torch\.(?:randn|randint|full|zeros|ones|empty)|nn\.Linear)\([^\n]*")
    text = Path(__file__).read_text().partition("def test_every_tensor_lies")[0]
    made = makers.findall(text)
    assert made
    assert [line for line in made if "device=DEVICE" not in line] == []
