"""The memory of a training by parts, and its peak: the trace of a step, played through the heap."""

from __future__ import annotations

import sys
from dataclasses import asdict, astuple, dataclass
from typing import Any

from lorax.inspect.estimate.heap import Heap
from lorax.inspect.estimate.process import process_bytes
from lorax.inspect.estimate.setting import Setting
from lorax.inspect.estimate.shape import Shape, shape_of
from lorax.inspect.estimate.tensors import state_bytes, step_bytes, weight_bytes
from lorax.inspect.estimate.trace import Trace, trace_step
from lorax.models.config import ModelConfig

FLOAT32 = 4
CARDS = (8, 16, 24, 48, 80)  # GB of memory that GPUs have
TRACED = 3  # layers that are traced of a deeper model


@dataclass(frozen=True)
class Parts:
    """Bytes of each part at its own largest; on one device.

    weights: of the base. adapter: what is trained beside it. gradients, optimizer: of all that is
    trained. activations: what a micro-batch holds at most, but for logits: those, in blocks or
    whole. other: on a CPU the process, an optimizer step's scratch, and holes in the heap.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int


@dataclass(frozen=True)
class Estimate:
    """What one setting takes of a model.

    parameters: all, the adapter's included; trainable: of them; kinds: of the base by kind.
    peak_bytes: the most that is held at once: less than all parts where they do not meet.
    """

    setting: Setting
    parameters: int
    trainable: int
    kinds: dict[str, int]
    parts: Parts
    peak_bytes: int

    def fits(self, gigabytes: int) -> bool:
        """Whether a device with so much memory (10^9 bytes each) holds it."""
        return self.peak_bytes <= gigabytes * 10**9

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        setting = self.setting
        return {
            "method": setting.method,
            "dtype": setting.dtype,
            "quantization": setting.quantization,
            "optimizer": setting.optimizer,
            "batch": setting.batch,
            "length": setting.length,
            "gradient_checkpointing": setting.checkpointing,
            "device": setting.device,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "parameters_by_kind": self.kinds,
            "bytes": asdict(self.parts),
            "peak_bytes": self.peak_bytes,
            "fits": {f"{size} GB": self.fits(size) for size in CARDS},
        }


@dataclass(frozen=True)
class Pass:
    """What two optimizer steps take beside weights and states, in bytes.

    held: the most of a micro-batch without logits and gradients. logits: the most that the loss
    adds. live: the most in use at once, states and gradients included. resident: of the heap.
    """

    held: int
    logits: int
    live: int
    resident: int

    def grown(self, other: Pass, times: int) -> Pass:
        """`other`, and so many times more of what it has beyond this one."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Pass(*(large + times * (large - small) for small, large in pairs))


def estimate(config: ModelConfig, setting: Setting, process: int | None = None) -> Estimate:
    """What training a model of that config takes.

    process: bytes of the process without a model; None: measured now.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    shape = shape_of(config, setting.adapter)
    held = _passes(config, setting, shape)
    weights, adapter = weight_bytes(shape, setting), FLOAT32 * sum(shape.adapter)
    other = step_bytes(setting.optimizer, shape.trained)
    peak = weights + adapter + held.live
    if setting.device == "cpu":
        process = process_bytes() if process is None else process
        other += process + held.resident - held.live
        peak = weights + adapter + process + held.resident
    parts = Parts(
        weights,
        adapter,
        FLOAT32 * sum(shape.trained),
        state_bytes(setting.optimizer, shape.trained),
        held.held,
        held.logits,
        other,
    )
    count = shape.base + sum(shape.adapter)
    return Estimate(setting, count, sum(shape.trained), shape.parameters, parts, peak)


def _passes(config: ModelConfig, setting: Setting, shape: Shape) -> Pass:
    """Of the whole model. Layers are alike: what one of them adds, all further ones add as well."""
    layers = config.sizes.layers
    if layers <= TRACED:
        return _played(config, setting, shape, layers)
    few = _played(config, setting, shape, TRACED - 1)
    return few.grown(_played(config, setting, shape, TRACED), layers - TRACED)


def _played(config: ModelConfig, setting: Setting, shape: Shape, layers: int) -> Pass:
    """The same for a model of so many layers."""
    sizes = shape.trained_of(layers)
    trace = trace_step(config, setting, layers)
    states, step = state_bytes(setting.optimizer, sizes), step_bytes(setting.optimizer, sizes)
    return Pass(*_pass_bytes(trace), *_play(trace, states, step))


def _pass_bytes(trace: Trace) -> tuple[int, int]:
    """The most that a pass holds without gradients and logits; the most that the loss adds."""
    now = most = before = loss = 0
    gradients = trace.gradients
    for event in trace.events:
        if event.storage in gradients:
            continue
        now += event.nbytes
        if event.stage == "loss":
            loss = max(loss, now - before)
        else:
            most = max(most, now)
            before = now if event.stage == "forward" else before
    return most, loss


def _play(trace: Trace, states: int, step: int) -> tuple[int, int]:
    """Two optimizer steps: the most that is in use at once, and the most that the heap takes.

    The states come with the first step and stay; `step` is what a step needs while it lasts.
    """
    heap, now, most = Heap(), 0, 0
    for time in range(2):
        cleared = False
        for event in trace.events:
            if event.stage == "clear" and not cleared:
                cleared = True
                if time == 0:
                    heap.allocate("states", states)
                    now += states
                heap.allocate("step", step)
                heap.free("step")
                most = max(most, now + step)
            now += event.nbytes
            most = max(most, now)
            if event.nbytes > 0:
                heap.allocate((time, event.storage), event.nbytes)
            elif event.nbytes < 0:
                heap.free((time, event.storage))
    return most, max(heap.peak if sys.platform == "linux" else 0, most)
