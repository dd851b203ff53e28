"""The frozen base in pieces: each process keeps one of N of every weight (PyTorch's FSDP2).

    at rest       process r:  rows r of every weight's codes, scales, plain values
    a layer runs  all gather that layer's weights, compute, and drop what is not theirs
    backward      the same once more

Quantized weights are gathered as they are stored: 4.1 bits a value for NF4 with double
quantization, an eighth of what float32 takes. What is trained stays whole on every process, and
its gradients are summed (processes.py): of an adapter that is a hundredth of the base, and so
every variant, optimizer and checkpoint is as without sharding. Embedding, head and final norm are
outside of the layers and stay whole too.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lorax.models import Model
from lorax.models.replace import replace_module
from lorax.quant.linear import QuantizedLinear
from lorax.quant.tensor import QuantizedTensor


class ShardedQuantizedLinear(QuantizedLinear):
    """A QuantizedLinear whose stored tensors are parameters, for FSDP2 to take and to give.

    `quantized` is whole while the layer runs, and a shard else.
    """

    def __init__(self, linear: QuantizedLinear):
        stored = linear.quantized
        super().__init__(stored, None)
        self.bias = linear.bias
        for name, tensor in zip(self._names, stored.tensors(), strict=True):
            if tensor.dim():  # FSDP2 takes no scalars: a double quantization's mean
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=False)

    @property
    def _names(self) -> list[str]:
        return [f"stored_{i}" for i in range(len(self._layout.tensors()))]

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, of the tensors that are here now."""
        tensors: list[Tensor] = [getattr(self, name) for name in self._names]
        return self._layout.replaced(tensors)

    @quantized.setter
    def quantized(self, weight: QuantizedTensor) -> None:
        self._layout = weight.replaced([t.new_empty(0) for t in weight.tensors()])


def shard_base(model: Model, size: int) -> None:
    """Leave this process with one of `size` parts of each layer's frozen weights."""
    trained = {p for p in model.parameters() if p.requires_grad}
    layers = [m for m in model.body.children() if isinstance(m, nn.ModuleList)]
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(model, name, ShardedQuantizedLinear(module))
    mesh = init_device_mesh(next(model.parameters()).device.type, (size,))
    for stack in layers:
        for layer in stack:
            fully_shard(layer, mesh=mesh, ignored_params=trained)
