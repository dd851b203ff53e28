"""What an adapter's config asks for, held against its file before any of it is allocated.

A config of one line can ask for rank 65,536 in every layer: hundreds of gigabytes, while the file
beside it holds a few kilobytes. The file's tensors are there already when the config is looked at,
and a config that fits them asks for just as many values.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.targets import find_targets
from lorax.errors import AdapterError
from lorax.quant.linear import QuantizedLinear

# Values that a config may ask for beyond what its file has: small differences are named one by one.
SLACK = 2**22


def check_declared_size(
    model: nn.Module,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    """Refuse a config that asks for many more values than its file has.

    Raises:
        AdapterError: both numbers, and the layer of the highest rank.
    """
    found = sum(tensor.numel() for tensor in tensors.values())
    declared = config.declared()
    if declared is not None:
        asked, what = declared
    elif not isinstance(config, LoRAConfig):
        return
    else:
        targets = find_targets(model, config)
        ranks = {name: config.rank(name) for name in targets}
        asked = sum(ranks[name] * sum(_sides(module)) for name, module in targets.items())
        widest = max(ranks, key=ranks.__getitem__)
        what = f"r = {ranks[widest]} for {widest}"
    if asked > found + SLACK:
        raise AdapterError(
            f"{where}: has {found} values, and its config asks for {asked} ({what}); the two do "
            "not belong together: get both files anew"
        )


def _sides(module: nn.Module) -> tuple[int, int]:
    """The widths of a Linear's or an Embedding's two factors, but for the rank."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    assert isinstance(module, nn.Linear | QuantizedLinear)
    return module.in_features, module.out_features
