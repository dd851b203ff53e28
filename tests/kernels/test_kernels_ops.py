"""The registered operators: fakes, gradients, torch.compile's tracing, and the switch."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_testing import (
    DEVICE,
    ROOT,
    make_weight,
    random,
)
from torch.utils._python_dispatch import TorchDispatchMode

import lorax
from lorax import backend as backend_module
from lorax.adapters.lora import LoRALinear
from lorax.backend import backend, uses_triton
from lorax.errors import EnvironmentProblem, UsageError
from lorax.kernels import dequantize, launch, lora, narrow, product_dx, reference, skinny
from lorax.models.llama import Llama
from lorax.models.llama_config import LlamaConfig
from lorax.quant import ops
from lorax.quant.linear import QuantizedLinear
from lorax.training import fused_loss
from lorax.training.fused_loss import cross_entropy_frozen_head


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
    torch.library.opcheck(ops._matmul, (x, random(20), *tensors), test_utils=OPCHECKS)
    torch.library.opcheck(ops._matmul_dx, (random(3, 20), *tensors), test_utils=OPCHECKS)
    A, B = random(4, 128).requires_grad_(), random(20, 4).requires_grad_()
    torch.library.opcheck(ops._lora_linear, (x, A, B, 0.5, None, *tensors), test_utils=OPCHECKS)
    case = (x, random(50, 128), torch.tensor([1, 2, 49], device=DEVICE), True)
    torch.library.opcheck(fused_loss._cross_entropy, case, test_utils=OPCHECKS)


@pytest.mark.parametrize("name", ["pytorch", "triton"])
def test_both_backends_give_the_same(weight, name):
    """In the interpreter here, on the GPU where there is one."""
    W = reference.dequantize(weight, torch.empty(20, 128, device=DEVICE))
    x = random(3, 128).requires_grad_()
    A, B = random(4, 128, scale=0.1).requires_grad_(), random(20, 4).requires_grad_()
    head, targets = random(50, 20), torch.tensor([1, 2, 49], device=DEVICE)
    with backend(name):
        y = ops.matmul_4bit(x, None, weight)
        path = ops.lora_linear_4bit(x, A, B, 0.5, None, weight)
        loss = cross_entropy_frozen_head(y + path, head, targets)
        loss.backward()
    found = [loss.detach(), x.grad, A.grad, B.grad]
    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    x, A, B = leaves
    hidden = 2 * x @ W.t() + 0.5 * (x @ A.t()) @ B.t()
    loss = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum")
    loss.backward()
    for mine, its in zip(found, [loss, *(t.grad for t in leaves)], strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-4, atol=1e-4)


def test_only_a_compiler_gets_operators(weight, monkeypatch):
    """An operator of torch.library costs the host ten times what an autograd Function does."""
    for module, name in (
        (ops, "_matmul"),
        (ops, "_matmul_dx"),
        (ops, "_lora_linear"),
        (ops, "_lora_backward"),
        (fused_loss, "_cross_entropy"),
    ):
        monkeypatch.setattr(module, name, None)
    x, A, B = (random(*shape).requires_grad_() for shape in ((3, 128), (4, 128), (20, 4)))
    targets = torch.tensor([1, 2, 49], device=DEVICE)
    with backend("triton"):
        y = ops.matmul_4bit(x, None, weight) + ops.lora_linear_4bit(x, A, B, 0.5, None, weight)
        cross_entropy_frozen_head(y, random(50, 20), targets).backward()
    assert all(t.grad.isfinite().all() for t in (x, A, B))


def test_a_compiled_lora_linear_has_the_gradients_of_the_plain_one(weight):
    def step(x, A, B):
        return ops.lora_linear_4bit(x, A, B, 0.5, None, weight).square().sum()

    leaves = [random(3, 128), random(4, 128, scale=0.1), random(20, 4)]
    found = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        given = [t.clone().requires_grad_() for t in leaves]
        function(*given).backward()
        found.append([t.grad for t in given])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its)


class Counting(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [True, False])
def test_the_backward_fills_no_zeros_and_no_dx_that_nobody_wants(weight, compiled, monkeypatch):
    """h is no one's output, so it gets no gradient; the first layer's x wants none either."""

    def refuse(*a):
        raise AssertionError("dx for nobody")

    monkeypatch.setattr(reference, "matmul_dx", refuse)
    A, B = random(4, 128).requires_grad_(), random(20, 4).requires_grad_()
    tensors = arguments(weight)
    with backend("pytorch"):
        if compiled:
            y = ops._lora_linear(random(3, 128), A, B, 0.5, None, *tensors)[0]
        else:
            y = ops.lora_linear_4bit(random(3, 128), A, B, 0.5, None, weight)
        with Counting() as counting:
            y.backward(torch.ones_like(y))
    assert counting.names
    assert [name for name in counting.names if name.startswith("zeros")] == []
    assert A.grad.any()


def in_another_thread(call):
    """As autograd does on CUDA, where no `with backend(...)` of this thread is known."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    assert found, "the call failed in its thread"


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are started."""
    names = []

    def recorded(kernel, *a, **options):
        names.append(kernel.fn.__name__)
        launch.launch(kernel, *a, **options)

    for module in (skinny, product_dx, narrow, lora, dequantize):
        monkeypatch.setattr(module, "launch", recorded)
    return names


def linears():
    """Each layer whose backward asks which program computes."""
    base = QuantizedLinear(lorax.quantize(random(20, 128), "nf4"))
    adapted = LoRALinear(QuantizedLinear(lorax.quantize(random(20, 128), "nf4")), 4, 0.5, 0.0)
    adapted.initialize(True)
    return {"quantized": base, "lora": adapted.to(DEVICE)}


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", ["quantized", "lora"])
def test_the_backward_computes_with_what_the_forward_took(kind, rows, launched, monkeypatch):
    layer = linears()[kind]
    x = random(rows, 128).requires_grad_()
    with backend("triton"):
        y = layer(x).sum()
    launched.clear()
    in_another_thread(y.backward)
    assert launched, "autograd's thread took PyTorch"

    monkeypatch.setenv("LORAX_KERNELS", "triton")
    with backend("pytorch"):
        y = layer(x).sum()
    launched.clear()
    in_another_thread(y.backward)
    assert launched == [], "autograd's thread took Triton"


def test_a_checkpoint_s_recomputation_computes_with_what_the_forward_took():
    class Layer(torch.nn.Module):
        def forward(self, x):
            seen.append(backend_module.chosen())
            return x.sin()

    seen = []
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Llama(config).model
    model.gradient_checkpointing = True
    x = torch.ones(2).requires_grad_()
    for name in ("pytorch", "compiled"):
        with backend(name):
            y = model.run(Layer(), x).sum()
        in_another_thread(y.backward)
    y = model.run(Layer(), x).sum()
    in_another_thread(y.backward)
    assert seen == ["pytorch", "pytorch", "compiled", "compiled", "auto", "auto"]


def test_torch_compile_traces_through(weight):
    def step(x):
        return torch.relu(ops.matmul_4bit(x, None, weight)).sum()

    x = random(3, 128)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(mine).backward()
    step(its).backward()
    torch.testing.assert_close(mine.grad, its.grad)


def test_a_whole_head_wants_no_gradient(weight):
    with torch.no_grad():
        loss = cross_entropy_frozen_head(
            random(2, 8), random(9, 8), torch.tensor([0, 8], device=DEVICE)
        )
    assert not loss.requires_grad


def test_the_switch(weight, monkeypatch):
    with pytest.raises(UsageError, match="'cuda' is unknown"), backend("cuda"):
        pass
    monkeypatch.setenv("LORAX_KERNELS", "fast")
    with pytest.raises(UsageError, match="LORAX_KERNELS='fast'"):
        uses_triton(random(5))
    monkeypatch.setenv("LORAX_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EnvironmentProblem, match="tensors are on cpu"):
        ops.matmul_4bit(torch.ones(5, 128), None, weight)


def test_importing_asks_cuda_nothing_and_brings_no_triton():
    """Neither lorax nor its operators import triton; kernels import torch and triton alone."""
    script = """
import sys, torch
sys.path.insert(0, "tests/helpers")
import kernel_testing
def refuse(*a, **k): raise AssertionError("CUDA was asked")
for name in ("init", "_lazy_init", "is_available", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
import lorax, lorax.quant.ops
assert "triton" not in sys.modules, "triton"
before = {name.split(".")[0] for name in sys.modules}
from lorax.kernels import adamw, cross_entropy, dequantize, lora, matmul, quantize
inside = {name for name in sys.modules if name.startswith("lorax.")}
mine = ("lorax.kernels", "lorax.quant", "lorax.errors", "lorax.version", "lorax.backend")
others = {n for n in inside if not n.startswith(mine)}
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
