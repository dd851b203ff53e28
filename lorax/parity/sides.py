"""Two programs with one adapter each, asked the same questions: `LoraxSide` and `PeftSide`.

Modules go by their path in the Hugging Face model, weights are (out, in), and an adapter's tensors
have PEFT's file names without the prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`. Each
side answers with its own code: PEFT's forward, backward and merge are PEFT's.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax.adapters.attached import adapter_layers, replaced_parameters
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.merge import merged_layer
from lorax.formats.peft import adapter_tensors
from lorax.formats.peft_directory import PREFIX
from lorax.models import Model
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear
from lorax.training.loss import summed_loss


@dataclass(frozen=True)
class Trace:
    """One forward and one backward pass.

    outputs: module -> what it gave, in the order of the calls; gradients: tensor -> its gradient.
    logits: (B, T, V); loss: mean cross entropy of the next token, in nats.
    """

    outputs: dict[str, Tensor]
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


class Side(ABC):
    """A model with an adapter, in one of the programs.

    name: of the program, with its version. root: the module that holds the Hugging Face names.
    """

    name: str
    root: nn.Module

    @abstractmethod
    def is_adapted(self, module: nn.Module) -> bool:
        """Whether this is an adapter's module, with the base's inside it."""

    @abstractmethod
    def base_of(self, module: nn.Module) -> nn.Module:
        """The base's module inside an adapter's."""

    @abstractmethod
    def named_tensors(self) -> dict[str, Tensor]:
        """What the program would save of the adapter, under PEFT's full names."""

    @abstractmethod
    def weight(self, base: nn.Module) -> Tensor:
        """A base module's weight, (out, in): a quantized one decoded to what it computes in."""

    @abstractmethod
    def packed(self, base: nn.Module) -> dict[str, Tensor]:
        """A 4-bit weight's bytes and scales: "bytes", "scales", and "nested ..." if there."""

    @abstractmethod
    def scaling(self, path: str) -> float | None:
        """What the path of that module is multiplied by, where the variant has one factor."""

    @abstractmethod
    def effective_weight(self, path: str) -> Tensor | None:
        """The dense weight that base and adapter amount to, (out, in) float32."""

    @abstractmethod
    def merged(self, path: str) -> dict[str, Tensor]:
        """ "weight" (out, in) and "bias" of the module after merging, in the base's dtype.

        {} where merging changes nothing, or where the program cannot merge.
        """

    @abstractmethod
    def base_tensors(self, path: str) -> dict[str, Tensor]:
        """The base's weight and bias at that path, without what was trained in their place."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Those of the adapter's tensors, by name, after a backward pass."""

    @abstractmethod
    def logits_and_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run forward: (B, T, V), and the mean loss, from which gradients flow back."""

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules with weights of their own, and the adapters' modules around such."""
        return dict(self._walk(self.root, ""))

    def _walk(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        has_weight = isinstance(module, QuantizedLinear) or "weight" in module._parameters
        if self.is_adapted(module) or has_weight:
            yield path, module
            return
        for name, child in module.named_children():
            yield from self._walk(child, f"{path}.{name}" if path else name)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors; what PEFT saves of the base, or twice, is left out."""
        named = {n.removeprefix(PREFIX): t for n, t in self.named_tensors().items()}
        return {n: t for n, t in named.items() if not is_copy(n)}

    def weight_and_bias(self, base: nn.Module) -> dict[str, Tensor]:
        """A module's own: "weight" (out, in), and "bias" where it has one."""
        bias = getattr(base, "bias", None)
        found = {"weight": self.weight(base).detach()}
        return found if bias is None else found | {"bias": bias.detach()}

    def run(self, ids: Tensor) -> Trace:
        """Forward and backward over ids (B, T)."""
        outputs: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(_keeper(outputs, path))
            for path, module in self.modules.items()
        ]
        self.root.zero_grad()
        try:
            logits, loss = self.logits_and_loss(ids)
        finally:
            for hook in hooks:
                hook.remove()
        if loss.requires_grad:
            loss.backward()
        gradients = {name: g.detach().clone() for name, g in self.gradients().items()}
        self.root.zero_grad()
        return Trace(outputs, logits.detach(), loss.item(), gradients)


def is_copy(name: str) -> bool:
    """Whether PEFT writes that tensor beside the adapter's own: the base's, or one once more."""
    wrapped = ".original_module." in name or ".modules_to_save." in name
    return wrapped or name.endswith(".base_layer.weight")


def _keeper(outputs: dict[str, Tensor], path: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(path, output.detach().clone())

    return keep


class LoraxSide(Side):
    """lorax's own model."""

    def __init__(self, model: Model):
        self.name = "lorax"
        self.root = self.model = model
        self.layers = adapter_layers(model)
        # A table that came with the file is the base's now, as in PEFT.
        own = [r for r in replaced_parameters(model) if r.trains]
        self.replaced = {p: r for r in own for p in r.places}
        self.taken = {PREFIX + p for r in replaced_parameters(model) for p in r.places}
        self.taken -= {PREFIX + p for p in self.replaced}

    def is_adapted(self, module: nn.Module) -> bool:
        """An AdapterLayer, of whatever variant."""
        return isinstance(module, AdapterLayer)

    def base_of(self, module: nn.Module) -> nn.Module:
        """Its base_layer."""
        assert isinstance(module, AdapterLayer)
        return module.base_layer

    def named_tensors(self) -> dict[str, Tensor]:
        """As `save_adapter` writes them."""
        named = adapter_tensors(self.model)
        return {name: tensor for name, tensor in named.items() if name not in self.taken}

    def weight(self, base: nn.Module) -> Tensor:
        """As it is, or dequantized."""
        if isinstance(base, QuantizedLinear):
            return base.quantized.dequantize(base.dtype)
        assert isinstance(base.weight, Tensor)
        return base.weight

    def packed(self, base: nn.Module) -> dict[str, Tensor]:
        """The bytes and scales of a four-bit weight, as lorax holds them; else {}."""
        if not isinstance(base, QuantizedLinear) or not isinstance(base.quantized, FourBitTensor):
            return {}
        q = base.quantized
        found = {"bytes": q.packed, "scales": q.absmax}
        if q.nested is not None:
            found |= {"nested scales": q.nested.absmax, "nested offset": q.nested.offset}
        return found

    def scaling(self, path: str) -> float | None:
        """The layer's `scaling`; None if the variant has none."""
        layer = self.layers.get(path)
        found = getattr(layer, "scaling", None)  # not every variant has one
        return float(found) if isinstance(found, int | float) else None

    def effective_weight(self, path: str) -> Tensor | None:
        """By the layer itself."""
        layer = self.layers.get(path)
        return None if layer is None else layer.effective_weight().detach()

    def merged(self, path: str) -> dict[str, Tensor]:
        """As `merge_adapter` would leave it; what was trained as a whole stays."""
        layer = self.layers.get(path)
        if layer is not None:
            return _parameters(merged_layer(layer)[0])
        module = self.modules[path]
        own = (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
        return _parameters(module) if any(name in self.replaced for name in own) else {}

    def base_tensors(self, path: str) -> dict[str, Tensor]:
        """As loaded; of a variant that starts inside the weight, what PEFT has for a base."""
        layer = self.layers.get(path)
        if layer is None:
            found, place = self.weight_and_bias(self.modules[path]), path
        else:
            found, place = self.weight_and_bias(layer.base_layer), f"{path}.base_layer"
            found["weight"] = layer.stored_base()
        for name in found:
            if f"{place}.{name}" in self.replaced:
                found[name] = self.replaced[f"{place}.{name}"].original.detach()
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Of the layers' tensors, and of what is trained as a whole, as the file holds it."""
        found = {}
        for path, layer in self.layers.items():
            for below, tensor in layer.tensors().items():
                if tensor.grad is not None and tensor.numel():
                    found[f"{path}.{below}"] = tensor.grad
        for place, replacement in self.replaced.items():
            whole = replacement.trained.grad
            if whole is not None:
                found[place] = self.model.as_stored(place, whole)
        return found

    def logits_and_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The model's forward for the logits; training's own loss for the gradients."""
        with torch.no_grad():
            logits = self.model(ids)
        return logits, summed_loss(self.model, ids, ids) / ids[:, 1:].numel()

    def exact_weight(self, path: str) -> Tensor | None:
        """The effective weight computed in float64 from the same tensors."""
        layer = self.layers.get(path)
        return None if layer is None else layer.effective_weight(torch.float64).detach()


class PeftSide(Side):
    """A PeftModel over a model of transformers."""

    def __init__(self, model: Any, adapter: str = "default"):
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
        from transformers.pytorch_utils import Conv1D

        self.name = f"peft {peft.__version__}"
        self.model = model
        self.root = model.get_base_model()
        self.adapter = adapter
        self._adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._saved = ModulesToSaveWrapper
        self._conv1d = Conv1D
        self.originals: dict[str, nn.Module] = {}  # of what is trained as a whole; see _walk
        self.notes: list[str] = []

    def _walk(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """A module that is trained as a whole is its copy, under the original's path."""
        if not isinstance(module, self._saved):
            yield from super()._walk(module, path)
            return
        original: Any = module.original_module
        for name, part in super()._walk(module.modules_to_save[self.adapter], path):
            self.originals[name] = original.get_submodule(name.removeprefix(path).lstrip("."))
            yield name, part

    def is_adapted(self, module: nn.Module) -> bool:
        """A tuner's layer, or the wrapper of single rows."""
        return isinstance(module, self._adapted)

    def base_of(self, module: nn.Module) -> nn.Module:
        """What stood there before."""
        inner: Any = _tuner(module)
        found: nn.Module = inner.get_base_layer()
        return found

    def named_tensors(self) -> dict[str, Tensor]:
        """As `save_pretrained` writes them."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(
            self.model, adapter_name=self.adapter, save_embedding_layers=False
        )

    def weight(self, base: nn.Module) -> Tensor:
        """As it is; Conv1D's turned; a 4-bit one decoded by bitsandbytes."""
        state = getattr(base.weight, "quant_state", None)
        assert isinstance(base.weight, Tensor)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(base.weight.data, state)
        return base.weight.t() if isinstance(base, self._conv1d) else base.weight

    def packed(self, base: nn.Module) -> dict[str, Tensor]:
        """The bytes and scales of a four-bit weight, as bitsandbytes holds them; else {}."""
        state: Any = getattr(base.weight, "quant_state", None)
        if state is None:
            return {}
        assert isinstance(base.weight, Tensor)
        return packed_by_bitsandbytes(base.weight.data, state)

    def scaling(self, path: str) -> float | None:
        """LoRA's; AdaLoRA divides by its rank elsewhere, so there it says nothing."""
        layer: Any = self.modules.get(path)
        if not hasattr(layer, "scaling") or hasattr(layer, "ranknum"):
            return None
        return float(layer.scaling[self.adapter])

    def effective_weight(self, path: str) -> Tensor | None:
        """What PEFT merges into a float32 copy of the base; for 4 bits, before it quantizes."""
        layer: Any = self._copy(path)
        if layer is None:
            return None
        base = self.base_of(layer)
        if getattr(base.weight, "quant_state", None) is None:
            merged = self._merge(path, layer.float()).get("weight")
            if merged is not None:
                return merged
        if not hasattr(layer, "get_delta_weight"):
            return None  # PEFT has no merge for this variant in 4 bits
        weight = self.weight(self.base_of(self.modules[path])).float()  # the copy's may be changed
        variant = getattr(layer, "lora_variant", {}).get(self.adapter)  # not every tuner has it
        if variant is not None:
            return variant.merge_safe(layer, self.adapter, weight).detach()
        return (weight + layer.get_delta_weight(self.adapter)).detach()

    def merged(self, path: str) -> dict[str, Tensor]:
        """As PEFT's own merge leaves a copy of the layer."""
        layer = self._copy(path)
        if layer is not None:
            return self._merge(path, layer)
        return self.weight_and_bias(self.modules[path]) if path in self.originals else {}

    def base_tensors(self, path: str) -> dict[str, Tensor]:
        """As loaded; a bias that PEFT trains where it stands is the base's no more."""
        module = self.modules[path]
        base = self.base_of(module) if self.is_adapted(module) else module
        found = self.weight_and_bias(self.originals.get(path, base))
        if path not in self.originals and "bias" in found and base.bias.requires_grad:
            del found["bias"]
        return found

    def gradients(self) -> dict[str, Tensor]:
        """By where the saved tensors lie in memory."""
        trained = {p.data_ptr(): p for p in self.root.parameters() if p.requires_grad}
        found = {}
        for name, tensor in self.tensors().items():
            parameter = trained.get(tensor.data_ptr()) if tensor.numel() else None
            if parameter is not None and parameter.grad is not None:
                found[name] = parameter.grad
        return found

    def logits_and_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> the model's logits (B, T, V), and their loss, () float64.

        torch's float32 cross entropy is 8.6e-6 off over SmolLM2's 49,152 words, which would move
        the adapter's gradients by 1.5e-4 and look like a difference between PEFT and lorax.
        """
        logits = self.model(input_ids=ids).logits[:, -ids.shape[1] :]  # without virtual tokens
        rows = logits[:, :-1].flatten(0, 1).double()
        return logits, F.cross_entropy(rows, ids[:, 1:].flatten())

    def _copy(self, path: str) -> nn.Module | None:
        module = self.modules.get(path)
        return copy.deepcopy(module) if module is not None and self.is_adapted(module) else None

    def _merge(self, path: str, module: nn.Module) -> dict[str, Tensor]:
        inner: Any = _tuner(module)
        if not hasattr(inner, "merge"):
            return {}  # PEFT has no merge for this variant
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that 4 bits round: this is measured here
                inner.merge()
        except RuntimeError as error:  # lora_bias where the base has no bias
            said = f"PEFT does not merge {path}: {error}"
            self.notes += [] if said in self.notes else [said]
            return {}
        return self.weight_and_bias(self.base_of(module))


def _tuner(module: nn.Module) -> nn.Module:
    """The layer that does the work inside PEFT's wrapper around an embedding's trained rows."""
    return getattr(module, "token_adapter", module)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters(recurse=False)}


def packed_by_bitsandbytes(weight: Tensor, state: Any) -> dict[str, Tensor]:
    """The bytes and scales of one weight in bitsandbytes' hands, named as in `Side.packed`."""
    found = {"bytes": weight.contiguous().view(torch.uint8).flatten(), "scales": state.absmax}
    if state.nested:
        offset = torch.as_tensor(state.offset, dtype=torch.float32)
        found |= {"nested scales": state.state2.absmax, "nested offset": offset}
    return {name: tensor.detach() for name, tensor in found.items()}
