"""The registered operators: fakes, gradients, torch.compile's tracing, and the switch."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_testing import (
    DEVICE,
    ROOT,
    make_weight,
    random,
)

from lorax.errors import EnvironmentProblem, UsageError
from lorax.kernels import reference
from lorax.kernels.hyper import AdamWStep
from lorax.quant import codebooks, ops


def arguments(weight):
    return (*weight[:3], list(weight.shape), *weight[4:])


@pytest.fixture
def weight(guard):
    return make_weight(guard, (20, 128))


OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def test_opcheck(weight):
    """torch's own check: schemas hold, fakes agree, gradients are registered."""
    x = random(3, 128).requires_grad_()
    tensors = arguments(weight)
    code = weight.code
    torch.library.opcheck(ops.dequantize_4bit, (*tensors, torch.bfloat16), test_utils=OPCHECKS)
    torch.library.opcheck(ops.quantize_4bit, (random(77), code, 64), test_utils=OPCHECKS)
    dynamic = codebooks.dynamic_map().to(DEVICE)
    torch.library.opcheck(ops.quantize_8bit, (random(77), dynamic, 256), test_utils=OPCHECKS)
    torch.library.opcheck(ops.matmul_4bit, (x, random(20), *tensors), test_utils=OPCHECKS)
    torch.library.opcheck(ops.matmul_4bit_dx, (random(3, 20), *tensors), test_utils=OPCHECKS)
    A, B = random(4, 128).requires_grad_(), random(20, 4).requires_grad_()
    torch.library.opcheck(ops._lora_linear, (x, A, B, 0.5, None, *tensors), test_utils=OPCHECKS)
    case = (x, random(50, 128), torch.tensor([1, 2, 49], device=DEVICE), True)
    torch.library.opcheck(ops._cross_entropy, case, test_utils=OPCHECKS)
    p = [random(5, 7)]
    numbers = list(AdamWStep.at(1, 1e-3))
    torch.library.opcheck(
        ops.adamw_, (p, [random(5, 7)], [random(5, 7)], [random(5, 7).abs()], numbers)
    )


@pytest.mark.parametrize("name", ["pytorch", "triton"])
def test_both_backends_give_the_same(weight, name):
    """In the interpreter here, on the GPU where there is one."""
    W = reference.dequantize(weight, torch.empty(20, 128, device=DEVICE))
    x = random(3, 128).requires_grad_()
    A, B = random(4, 128, scale=0.1).requires_grad_(), random(20, 4).requires_grad_()
    head, targets = random(50, 20), torch.tensor([1, 2, 49], device=DEVICE)
    with ops.backend(name):
        assert torch.equal(ops.dequantize_4bit(*arguments(weight), torch.float32), W)
        y = ops.matmul_4bit(x, None, *arguments(weight))
        path = ops.lora_linear_4bit(x, A, B, 0.5, None, *arguments(weight))
        loss = ops.cross_entropy_frozen_head(y + path, head, targets)
        loss.backward()
    found = [loss.detach(), x.grad, A.grad, B.grad]
    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    x, A, B = leaves
    hidden = 2 * x @ W.t() + 0.5 * (x @ A.t()) @ B.t()
    loss = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum")
    loss.backward()
    for mine, its in zip(found, [loss, *(t.grad for t in leaves)], strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-4, atol=1e-4)


def test_optimizers(weight):
    p, g = random(5, 7), random(5, 7, seed=1)
    expected = p - 1e-3 * g.sign()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    ops.adamw_([p], [g], [m], [v], list(AdamWStep.at(1, 1e-3)))
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match="expected 8 for each of 1"):
        ops.adamw_([p], [g], [m], [v], [1.0])
    ops.adamw_([], [], [], [], [])


def test_torch_compile_traces_through(weight):
    def step(x):
        return torch.relu(ops.matmul_4bit(x, None, *arguments(weight))).sum()

    x = random(3, 128)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(mine).backward()
    step(its).backward()
    torch.testing.assert_close(mine.grad, its.grad)


def test_a_whole_head_wants_no_gradient(weight):
    with torch.no_grad():
        loss = ops.cross_entropy_frozen_head(
            random(2, 8), random(9, 8), torch.tensor([0, 8], device=DEVICE)
        )
    assert not loss.requires_grad


def test_the_switch(weight, monkeypatch):
    with pytest.raises(UsageError, match="'cuda' is unknown"), ops.backend("cuda"):
        pass
    monkeypatch.setenv("LORAX_KERNELS", "fast")
    with pytest.raises(UsageError, match="LORAX_KERNELS='fast'"):
        ops.quantize_4bit(random(5), weight.code, 64)
    monkeypatch.setenv("LORAX_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EnvironmentProblem, match="tensors are on cpu"):
        ops.quantize_4bit(torch.ones(5), weight.code.cpu(), 64)


def test_importing_asks_cuda_nothing_and_brings_no_triton():
    """Neither lorax nor its operators import triton; kernels import torch and triton alone."""
    script = """
import sys, torch
sys.path.insert(0, "tests")
import kernel_testing
def refuse(*a, **k): raise AssertionError("CUDA was asked")
for name in ("init", "_lazy_init", "is_available", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
import lorax, lorax.quant.ops
assert "triton" not in sys.modules, "triton"
before = {name.split(".")[0] for name in sys.modules}
from lorax.kernels import adamw, cross_entropy, dequantize, lora, matmul, quantize
inside = {name for name in sys.modules if name.startswith("lorax.")}
others = {n for n in inside if not n.startswith(("lorax.kernels", "lorax.quant", "lorax.errors"))}
assert not others, others
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment)


def test_kernels_import_torch_and_triton_alone():
    allowed = ("torch", "triton", "lorax.kernels", "__future__", "collections", "contextlib")
    allowed += ("dataclasses", "itertools", "math", "typing")
    for file in sorted((ROOT / "kernels").glob("*.py")):
        for line in file.read_text().splitlines():
            words = line.split()
            if (
                words[:1] in (["import"], ["from"])
                and len(words) > 1
                and not line.startswith("    ")
            ):
                assert words[1].startswith(allowed), f"{file.name}: {line}"
