"""Replace one submodule of a model: how quantization and adapters take a Linear's place."""

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with this dotted name, like "model.layers.0.self_attn.q_proj".

    Raises:
        AttributeError: the name's parent does not exist; the model stays as it was.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
