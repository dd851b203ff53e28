"""What a layer of Llama-3-8B costs in the hand-written step, counted without a GPU.

    python benchmarks/layer_cost.py      launches, bytes, host time; an estimate of a step

The layer runs for real, at its real shapes, on torch's meta device: kernels are counted where they
would start, torch's own operators where they are dispatched, with the bytes of the tensors that
each reads and writes. Views, allocations and the attention's insides are not launches; attention is
one forward and three backward. Host time is what Python and torch take for the same calls over tiny
tensors on a CPU, with nothing behind the launches: the fastest of 200, as others use the machine.

The estimate is a roofline over these counts: every launch takes the longer of its bytes and its
operations. It is an estimate, and no measurement; docs/performance.md marks it as one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import kernel_testing  # noqa: F401  finds lorax where it is not installed
import torch
from gpu_model import SHAPE, TINY, random_four_bit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

RATE, BANDWIDTH = 800e12, 2.8e12  # an H100's: bf16 operations and bytes a second that it reaches
LAUNCH_SECONDS = 1.5e-6  # between two kernels of a graph
FREE = ("view", "reshape", "transpose", "t.default", "slice", "split", "detach", "empty", "expand",
        "as_strided", "unsqueeze", "permute", "alias", "select", "_unsafe_view", "new_empty",
        "is_same_size", "squeeze", "lift_fresh", "unbind", "_to_copy_views")  # fmt: skip


@dataclass
class Counts:
    """Of one pass: each launch's name, bytes and matrix operations."""

    launches: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, name: str, tensors: Any, operations: int = 0) -> None:
        unique = {id(t): t.numel() * t.element_size() for t in flat(tensors)}
        self.launches.append((name, sum(unique.values()), operations))

    @property
    def bytes(self) -> int:
        return sum(size for _, size, _ in self.launches)

    @property
    def seconds(self) -> float:
        """The roofline: each launch the longer of its bytes and its operations."""
        return sum(
            max(size / BANDWIDTH, operations / RATE) + LAUNCH_SECONDS
            for _, size, operations in self.launches
        )


def flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from flat(part)


class Dispatched(TorchDispatchMode):
    """Counts torch's own operators that would be launches."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            operations = 0
            if name.startswith(("mm", "addmm")):
                a, b = args[-2:]
                operations = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.counts.add(name, (args, tuple((kwargs or {}).values()), out), operations)
        return out


class Attention(torch.autograd.Function):
    """In the place of torch's: its launches, and tensors of its shapes."""

    counts: Counts | None

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype,
                          device=q.device).transpose(1, 2)  # fmt: skip
        if Attention.counts is not None:
            Attention.counts.add("attention", (q, k, v, out), attention_operations(q))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved, counts = ctx.saved_tensors, Attention.counts
        if counts is not None:
            work = attention_operations(saved[0]) * 5 // 2
            counts.add("attention backward", (saved, saved, gradients), work)
            counts.add("attention backward, sums", gradients)
            counts.add("attention backward, cast", saved[0])
        return tuple(torch.empty_like(x) for x in saved)


def attention_operations(q: Tensor) -> int:
    B, H, T, D = q.shape
    return 2 * B * H * T * T * D  # two products, of which causality leaves half


@contextmanager
def stubbed(counts: Counts | None) -> Iterator[None]:
    """Inside, kernels are counted (None: not even that) and not started."""
    from lorax.kernels import dropout, extended, lora, norm, rope, step, swiglu
    from lorax.training.gpu import known

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if counts is None:
            return
        name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
        counts.add(name, args)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return Attention.apply(q, k, v)

    Attention.counts = counts
    with ExitStack() as stack:
        for module in (dropout, extended, lora, norm, rope, swiglu):
            stack.enter_context(patch.object(module, "launch", launch))
        stack.enter_context(patch.object(known, "kernels_for_step", lambda x: step))
        attention = torch.nn.functional
        stack.enter_context(patch.object(attention, "scaled_dot_product_attention", attend))
        yield


def layer_of(shape: dict[str, Any], device: str, dropout: float) -> Any:
    """A body with one layer, four-bit Linears and LoRA on all of them."""
    from lorax.adapters.config import LoRAConfig
    from lorax.adapters.inject import add_adapter
    from lorax.models.llama import Llama
    from lorax.models.llama_config import LlamaConfig
    from lorax.quant.linear import QuantizedLinear

    with torch.device(device):
        model = Llama(LlamaConfig(**{**shape, "num_hidden_layers": 1, "vocab_size": 64}))
    model = model.to(torch.bfloat16).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, own = name.rpartition(".")
            weight = random_four_bit(module.out_features, module.in_features, device)
            weight.operands()  # makes the tables that all weights share, once
            setattr(model.get_submodule(parent), own, QuantizedLinear(weight))
    how = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": dropout}
    add_adapter(model, LoRAConfig(**how))
    return model.train()


def passes(
    shape: dict[str, Any], keep: bool | str, dropout: float, tokens: int, device: str = "meta"
) -> tuple[Counts, Counts]:
    """What forward and backward of a layer launch; what is computed again counts as backward."""
    from lorax.models.attention import Context
    from lorax.training.gpu.known import halves_of
    from lorax.training.gpu.layer import run_layer

    model = layer_of(shape, device, dropout)
    x = torch.empty(1, tokens, shape["hidden_size"], dtype=torch.bfloat16, device=device)
    rope = (torch.empty(tokens, shape["head_dim"], dtype=torch.bfloat16, device=device),) * 2
    seed = torch.empty(1, dtype=torch.int64, device=device) if dropout else None
    both = Counts(), Counts()
    x.requires_grad_()
    for counts, part in zip(both, ("forward", "backward"), strict=True):
        with stubbed(counts), Dispatched(counts):
            if part == "forward":
                halves = halves_of(model.model.layers[0], x, rope, Context(), seed)
                assert halves is not None
                y = run_layer(x, *halves, keep)
            else:
                y.backward(torch.empty_like(y))
    return both


def host_milliseconds(rounds: int = 200) -> float:
    """A checkpointed layer, forward and backward, with nothing behind its launches: the fastest."""
    from lorax.models.attention import Context
    from lorax.training.gpu.known import halves_of
    from lorax.training.gpu.layer import run_layer

    model, tokens = layer_of(TINY, "cpu", 0.1), 4
    layer = model.model.layers[0]
    x = torch.zeros(1, tokens, TINY["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    rope = (torch.zeros(tokens, TINY["head_dim"], dtype=torch.bfloat16),) * 2
    dy, seed, times = torch.zeros_like(x), torch.zeros(1, dtype=torch.int64), []
    with stubbed(None):
        for _ in range(rounds):
            begin = time.perf_counter()
            halves = halves_of(layer, x, rope, Context(), seed)
            assert halves is not None
            run_layer(x, *halves, True).backward(dy)
            times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def estimate(keep: bool | str, dropout: float = 0.1, tokens: int = 2048) -> dict[str, float]:
    """Milliseconds of a step of the whole model, by this roofline; the head and AdamW as gpu.md."""
    forward, backward = passes(SHAPE, keep, dropout, tokens)
    layers = SHAPE["num_hidden_layers"]
    head = 1e3 * (3 * 2 * tokens * SHAPE["hidden_size"] * SHAPE["vocab_size"] * 2 / 3) / RATE
    parts = {
        "forward": 1e3 * layers * forward.seconds,
        "backward": 1e3 * layers * backward.seconds,
        "head and cross entropy": head,
        "optimizer and clipping": 1.0,
    }
    return {**parts, "in all": sum(parts.values())}


def main() -> None:
    print(f"{'recompute':12}{'dropout':>8}{'forward':>9}{'backward':>9}{'GB':>7}{'step, ms':>10}")
    for keep in (True, "selective", False):
        for dropout in (0.0, 0.1):
            forward, backward = passes(SHAPE, keep, dropout, 2048)
            size = (forward.bytes + backward.bytes) / 1e9
            print(
                f"{keep!s:12}{dropout:8}{len(forward.launches):9}{len(backward.launches):9}"
                f"{size:7.2f}{estimate(keep, dropout)['in all']:10.1f}"
            )
    print(f"host: {host_milliseconds():.2f} ms a checkpointed layer, forward and backward")
    for name, value in estimate(True).items():
        print(f"{name:28}{value:8.1f} ms")


if __name__ == "__main__":
    main()
