"""An adapter's modules, taken out of a model and put in again: what switching adapters is.

    in     model.layers.0.self_attn.q_proj = LoRALinear      whose base_layer is the base's Linear
    out    model.layers.0.self_attn.q_proj = the Linear      and the LoRALinear waits here

Nothing is copied and nothing computed: a switch sets one attribute a layer. In the model the
adapter is what `load_adapter` without a name makes, so that everything else that lorax does with an
adapter (saving, merging, training, comparing) takes it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from lorax.adapters.attached import attach_config, replaced_parameters, require_adapter
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.modules_to_save import Replacement
from lorax.adapters.stated import stated_config
from lorax.errors import AdapterError


@dataclass
class AdapterModules:
    """The layers of one adapter by their paths, and the parameters that it replaces.

    config: what the model says of its adapter while they are in; None says nothing.
    places: of the layers; found at the first switch.
    """

    layers: dict[str, AdapterLayer]
    config: AdapterConfig | None = None
    replaced: list[Replacement] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list, repr=False)

    @staticmethod
    def of(model: nn.Module) -> AdapterModules:
        """Those that stand in the model now; an AdapterError where there are none."""
        config = stated_config(model)
        return AdapterModules(require_adapter(model), config, list(replaced_parameters(model)))

    @property
    def nbytes(self) -> int:
        """Of the adapter's own tensors, without the base's."""
        tensors = {id(t): t.nbytes for layer in self.layers.values() for t in own_tensors(layer)}
        tensors |= {id(r.trained): r.trained.nbytes for r in self.replaced}
        return sum(tensors.values())

    @property
    def is_trained(self) -> bool:
        """Whether something of it requires gradients."""
        trained = [t for layer in self.layers.values() for t in layer.tensors().values()]
        return any(t.requires_grad for t in [*trained, *(r.trained for r in self.replaced)])

    @property
    def is_merged(self) -> bool:
        """Whether merged weights stand beside its layers."""
        return any(layer.merged is not None for layer in self.layers.values())

    def are_in(self, model: nn.Module) -> bool:
        """Whether the model computes with these layers."""
        found = [parent._modules.get(child) for parent, child in self._places(model)]
        return all(one is layer for one, layer in zip(found, self.layers.values(), strict=True))

    def check_base(self, model: nn.Module) -> None:
        """Refuse a model whose modules are not those that the layers were made around.

        Raises:
            AdapterError: with the first module that is another one.
        """
        for (parent, child), (name, layer) in zip(
            self._places(model), self.layers.items(), strict=True
        ):
            found = parent._modules.get(child)
            if found is not layer.base_layer:
                raise AdapterError(
                    f"{name} is a {type(found).__name__} that the adapter was not loaded over; "
                    "expected the base as it was then: take out what was put there since "
                    "(lorax.unload_adapter for an adapter without a name), or load the model anew"
                )

    def put_in(self, model: nn.Module) -> None:
        """Let the model compute with them; it has no other adapter."""
        self.settle()
        self._put(model, self.layers.values())
        for replacement in self.replaced:
            replacement.put(model, trained=True)
        if self.replaced:
            model.__dict__["_replaced_parameters"] = self.replaced
        if self.config is not None:
            attach_config(model, self.config)

    def take_out(self, model: nn.Module) -> None:
        """Let the model compute as its base."""
        for replacement in self.replaced:
            replacement.put(model, trained=False)
        model.__dict__.pop("_replaced_parameters", None)
        self._put(model, [layer.base_layer for layer in self.layers.values()])
        model.__dict__.pop("adapter_config", None)

    def _put(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        for (parent, child), module in zip(self._places(model), modules, strict=True):
            setattr(parent, child, module)

    def _places(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """Where the layers stand: a module and the name in it, looked up once."""
        if not self.places:
            split = [name.rpartition(".") for name in self.layers]
            self.places = [(model.get_submodule(parent), child) for parent, _, child in split]
        return self.places

    def settle(self) -> None:
        """Follow the base, which may have changed mode or device while they were out."""
        for layer in self.layers.values():
            if layer.training is not layer.base_layer.training:
                layer.train(layer.base_layer.training)
        for layer in self.layers.values():
            tensor = next(iter(layer.tensors().values()), None)
            if tensor is None:
                continue
            if tensor.device == layer.device:
                return
            layer.to(layer.device)
            for replacement in self.replaced:
                replacement.trained.data = replacement.trained.data.to(layer.device)


def own_tensors(layer: AdapterLayer) -> list[Tensor]:
    """The layer's parameters and buffers but for its base's."""
    base = {id(t) for t in (*layer.base_layer.parameters(), *layer.base_layer.buffers())}
    return [t for t in (*layer.parameters(), *layer.buffers()) if id(t) not in base]
