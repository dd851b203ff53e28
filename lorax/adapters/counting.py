"""How many parameters an adapted model has, and how many of them are trained."""

from torch import nn

from lorax.adapters.attached import adapter_layers
from lorax.quant.linear import QuantizedLinear


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized weight counts as many as it has values.

    Copies of the base that a layer keeps (LoftQ's) stand for parameters that are counted already.
    """
    plain = list(model.parameters())
    copies = [copy for layer in adapter_layers(model).values() for copy in layer.copies()]
    bases = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m not in copies]
    quantized = [base.quantized for base in bases]
    everything = sum(p.numel() for p in plain) + sum(q.shape.numel() for q in quantized)
    return sum(p.numel() for p in plain if p.requires_grad), everything


def print_trainable_parameters(model: nn.Module) -> None:
    """Print one line, as PEFT does."""
    trainable, everything = count_parameters(model)
    print(
        f"trainable params: {trainable:,d} || all params: {everything:,d} || "
        f"trainable%: {100 * trainable / everything:.4f}"
    )
