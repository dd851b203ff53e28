"""A step of lorax's own code on tensors without memory: each allocation and release, in order.

torch's FakeTensors have shapes, dtypes and a device, and operators know which shapes they give. So
the code that trains runs as it stands, the hand-written step or the plain one, any family, any
variant of adapter, and a mode below autograd writes down when a storage appears and when the last
reference to it goes:

    forward, layer by layer      + what is kept for the backward pass, + - what else it needs
    loss                         + - blocks of logits
    backward, layer by layer     + gradients, - what was kept

What an operator allocates inside itself is not seen (a library's packed copy of a weight), but for
logsumexp, whose own tensor is as large as the logits. Shapes that depend on values (`nonzero`) are
told: the setting says how many tokens are trained.

The trace runs in a thread of its own, where modes and scratch buffers are nobody else's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorax.adapters.inject import add_adapter
from lorax.errors import LoraxError, UnsupportedModel
from lorax.formats.huggingface import quantizable
from lorax.formats.model_config import DTYPES, new_model, undrawn
from lorax.inspect.estimate.blank import blank_weight, prepare
from lorax.inspect.estimate.setting import Setting
from lorax.inspect.estimate.shape import drawn_plainly
from lorax.models import Model
from lorax.models.config import ModelConfig
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear
from lorax.training.fast import parts
from lorax.training.fast.head import BLOCK
from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss


@dataclass(frozen=True)
class Event:
    """A storage appears (nbytes > 0) or goes (the same number, negative).

    stage: "forward", "loss", "backward" or "clear", during which it happened.
    """

    storage: int
    nbytes: int
    stage: str


@dataclass
class Trace:
    """A step's events; gradients: the storages that the parameters' gradients end up in."""

    events: list[Event] = field(default_factory=list)
    gradients: set[int] = field(default_factory=set)


class _Recorder(TorchDispatchMode):
    """Writes down the storages of what operators give."""

    def __init__(self, trace: Trace, targets: int):
        super().__init__()
        self.trace, self.targets, self.stage = trace, targets, "forward"
        self._count = 0
        self._watched: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.nonzero.default:
            found = self._nonzero(args[0])
        else:
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.logsumexp.default:
                self._inside(args[0])
        for value in found if isinstance(found, list | tuple) else (found,):
            if isinstance(value, Tensor):
                self._note(value)
        return found

    def _nonzero(self, mask: Tensor) -> Tensor:
        """Places of what is true: the trained tokens; in a block of the head its share of them."""
        count = self.targets if mask.dim() == 2 else max(1, min(len(mask), BLOCK // 32))
        return torch.empty(count, mask.dim(), dtype=torch.int64)

    def _inside(self, like: Tensor) -> None:
        """An operator's own tensor of that size: logsumexp makes exp(x - max) beside x."""
        size, self._count = like.numel() * like.itemsize, self._count + 1
        self.trace.events.append(Event(self._count - 1, size, self.stage))
        self.trace.events.append(Event(self._count - 1, -size, self.stage))

    def leave_out(self, model: Model) -> None:
        """What is there already: parameters, and quantized weights' parts."""
        there: list[Tensor] = list(model.parameters())
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                there += module.quantized.tensors()
        self._there = [tensor.untyped_storage() for tensor in there]
        self._watched |= {id(storage): (-1, None) for storage in self._there}

    def numbers(self, tensors: Iterable[Tensor | None]) -> set[int]:
        """The storages of these tensors, by their numbers in the events."""
        there = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
        return {self._watched[id(storage)][0] for storage in there if id(storage) in self._watched}

    def _note(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = id(storage)
        if key in self._watched:
            return
        nbytes, number = storage.nbytes(), self._count
        self._count += 1
        self.trace.events.append(Event(number, nbytes, self.stage))

        def gone(_: Any) -> None:
            del self._watched[key]
            self.trace.events.append(Event(number, -nbytes, self.stage))

        self._watched[key] = number, weakref.ref(storage, gone)


def trace_step(config: ModelConfig, setting: Setting, layers: int) -> Trace:
    """The events of a step: one micro-batch, or two where gradients accumulate.

    layers: how many of the model's layers are in it; all, if there are no more.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    trace = Trace()
    _in_a_thread(lambda: _run(config, setting, layers, trace))
    return trace


def _in_a_thread(work: Callable[[], None]) -> None:
    """Do it there, and raise here what it raises.

    Raises:
        UnsupportedModel: code of somebody's own asks a tensor without memory for its values.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in raised:
        if isinstance(error, LoraxError) or not isinstance(error, Exception):
            raise error
        raise UnsupportedModel(
            f"the step cannot be followed without memory ({type(error).__name__}: {error}); train "
            "a few steps of it instead, and see peak_bytes in the run's environment.json"
        ) from error


def _run(config: ModelConfig, setting: Setting, layers: int, trace: Trace) -> None:
    prepare(setting)
    with _known_as_parameters(), FakeTensorMode(allow_non_fake_inputs=True):
        model = _blank_model(config, setting, layers)
        recorder = _Recorder(trace, setting.targets)
        recorder.leave_out(model)
        with accelerated(model, setting.fast and setting.device == "cpu"), recorder:
            for _ in range(2 if setting.accumulates else 1):
                recorder.stage = "forward"
                ids = torch.zeros(setting.batch, setting.length, dtype=torch.int64)
                _pass(model, ids, recorder)
            recorder.stage = "clear"
            trace.gradients |= recorder.numbers(p.grad for p in model.parameters())
            for parameter in model.parameters():
                parameter.grad = None


def _pass(model: Any, ids: Tensor, recorder: _Recorder) -> None:
    hidden_states = model.hidden_states

    def noticed(*inputs: Any) -> Tensor:
        found = hidden_states(*inputs)
        recorder.stage = "loss"
        return found

    model.hidden_states = noticed
    try:
        loss = summed_loss(model, ids, ids) / 2
    finally:
        del model.hidden_states
    recorder.stage = "backward"
    loss.backward()


def _blank_model(config: ModelConfig, setting: Setting, layers: int) -> Model:
    """The model with its adapter, in training mode, on FakeTensors of a CPU."""
    model, dtype = new_model(config), DTYPES[setting.dtype]
    for name, module in model.body.named_children():
        if isinstance(module, nn.ModuleList):
            setattr(model.body, name, module[:layers])
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            blank = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, key, nn.Parameter(blank, requires_grad=False))
        if setting.quantization is not None and quantizable(name, module):
            assert isinstance(module, nn.Linear)
            linear = QuantizedLinear(blank_weight(setting.quantization, module.weight, dtype))
            linear.bias = module.bias
            replace_module(model, name, linear)
    model.tie_weights()
    if setting.adapter is None:
        model.requires_grad_(True)
    else:
        with undrawn():
            add_adapter(model, drawn_plainly(setting.adapter))
    model.gradient_checkpointing = setting.checkpointing
    model.train()
    return model


@contextmanager
def _known_as_parameters() -> Iterator[None]:
    """The hand-written step takes parameters on FakeTensors like others."""
    parts.PARAMETERS.add(FakeTensor)
    try:
        yield
    finally:
        parts.PARAMETERS.discard(FakeTensor)
