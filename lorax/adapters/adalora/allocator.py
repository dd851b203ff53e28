"""RankAllocator: AdaLoRA's ranks go where they are worth most (Zhang et al., arXiv:2303.10512).

Every layer starts with init_r ranks. A rank i of a layer is a triplet (A's row, E's value, B's
column); after each optimizer step it gets a score, and the lowest of all layers' scores lose:

    I = |p * dp|                        sensitivity of every number, from the step's gradient
    I_bar <- beta1 I_bar + (1 - beta1) I
    U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|
    score = s(E_i) + mean s(A_i) + mean s(B_i)          s = I_bar * U_bar

Losing sets E_i to zero. Until the ranks are settled it may grow back: the optimizer goes on moving
it, and the next dealing-out may keep it. The number that stays falls from init_r to target_r a
layer on average, along a cubic curve (`AdaLoRAConfig.budget`). The loss gets

    orth_reg_weight * mean over all A, B of ||A A^T - I||_F, ||B^T B - I||_F

Steps are counted from 1, as in the paper, so that step total_step - tfinal always comes and settles
the ranks. (PEFT's examples count from 0: with tfinal = 0 that step never comes there.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lorax.adapters.adalora.config import AdaLoRAConfig
from lorax.adapters.adalora.layer import AdaLoRALinear
from lorax.adapters.attached import attach_config, require_adapter
from lorax.adapters.config import LoRAConfig
from lorax.adapters.layer import AdapterLayer
from lorax.adapters.lora import LoRALinear
from lorax.adapters.stated import adapter_config
from lorax.errors import AdapterError
from lorax.models.replace import replace_module


class RankAllocator:
    """Deals out the ranks of a model with AdaLoRA while it trains.

        for ...:
            (loss + allocator.penalty()).backward()
            optimizer.step()
            allocator.update()              # the gradients are still there
            optimizer.zero_grad()
        allocator.finish()

    masks: for each layer which of its ranks are left, as of the last dealing-out; None before.

    Raises:
        AdapterError: no AdaLoRA there, its ranks are settled already, or its config leaves them
            nothing to do.
    """

    def __init__(self, model: nn.Module):
        config = adapter_config(model)
        if not isinstance(config, AdaLoRAConfig):
            raise AdapterError(
                f"the model's adapter is {config.peft_type}; expected ADALORA; add one first"
            )
        if config.rank_pattern is not None:
            raise AdapterError(
                "the adapter's ranks are settled: its rank_pattern is there"
                "; start a new AdaLoRA for other ranks"
            )
        config.check_that_ranks_fall()
        self.model = model
        self.config = config
        self.step = 0
        self.masks: dict[str, list[bool]] | None = None
        self._layers = adalora_layers(model)
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    def penalty(self) -> Tensor:
        """What the loss of a whole optimizer step gets on top: () float32."""
        norms = [norm for layer in self._layers.values() for norm in layer.orthogonality()]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    @torch.no_grad()
    def update(self, watch: bool = True) -> None:
        """Count an optimizer step, and do what it asks for: watch, deal out, hold.

        watch: False for a step that was left out, whose gradients mean nothing.

        Raises:
            AdapterError: there are no gradients.
        """
        self.step += 1
        config, step, last = self.config, self.step, self.config.last_allocation
        if watch and step < last:
            self._watch()
        due = step == last or (config.tinit < step < last and step % config.deltaT == 0)
        if due:
            self.masks = self._deal_out(config.budget(step, len(self._layers)))
        if due or step > last:
            self._hold()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the next steps depend on: {"step", "masks"}, and the averages by name."""
        tensors = {f"sensitivity.{name}": t for name, t in self._sensitivity.items()}
        tensors |= {f"uncertainty.{name}": t for name, t in self._uncertainty.items()}
        return {"step": self.step, "masks": self.masks}, tensors

    def load_state(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave, for a model set up alike."""
        self.step, self.masks = numbers["step"], numbers["masks"]
        kinds: dict[str, dict[str, Tensor]] = {"sensitivity": {}, "uncertainty": {}}
        devices = {name: parameter.device for name, parameter in self._parameters()}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(".")
            kinds[kind][parameter] = tensor.to(devices[parameter])
        self._sensitivity, self._uncertainty = kinds["sensitivity"], kinds["uncertainty"]

    @property
    def ranks(self) -> dict[str, int]:
        """{layer's path: the ranks that it has now}, of init_r at first."""
        if self.masks is None:
            return {name: layer.r for name, layer in self._layers.items()}
        return {name: sum(mask) for name, mask in self.masks.items()}

    def finish(self) -> None:
        """Take the lost ranks out of the layers, and write what is left into the config.

        Raises:
            AdapterError: the ranks are not settled yet.
        """
        if self.masks is None or self.step < self.config.last_allocation:
            raise AdapterError(
                f"the ranks settle after step {self.config.last_allocation}, but update() was "
                f"called {self.step} times; call it behind each optimizer.step()"
            )
        for name, layer in self._layers.items():
            layer.prune(self.masks[name])
        pattern = {f"{name}.lora_E": mask for name, mask in self.masks.items()}
        config = dataclasses.replace(self.config, rank_pattern=pattern)
        attach_config(self.model, config)

    def _watch(self) -> None:
        """Move the averages of sensitivity and uncertainty by this step's gradient."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, parameter in self._parameters():
            if parameter.grad is None:
                raise AdapterError(
                    f"{name} has no gradient; call update() between backward() and zero_grad()"
                )
            now = (parameter * parameter.grad).abs()
            zero = torch.zeros_like(now)
            mean = beta1 * self._sensitivity.get(name, zero) + (1 - beta1) * now
            self._sensitivity[name] = mean
            spread = (now - mean).abs()
            before = self._uncertainty.get(name, zero)
            self._uncertainty[name] = beta2 * before + (1 - beta2) * spread

    def _deal_out(self, budget: int) -> dict[str, list[bool]]:
        """Which ranks stay if all layers together may keep `budget` of them."""
        scores = {name: self._scores(name) for name in self._layers}
        everything = torch.cat(list(scores.values()))
        threshold = everything.kthvalue(everything.numel() - budget).values
        return {name: (score > threshold).tolist() for name, score in scores.items()}

    def _scores(self, name: str) -> Tensor:
        """What each rank of the layer is worth: (r,)."""
        A, B, E = (
            self._sensitivity[f"{name}.{below}"] * self._uncertainty[f"{name}.{below}"]
            for below in ("lora_A", "lora_B", "lora_E")
        )
        return E[:, 0] + (A.mean(dim=1) + B.mean(dim=0))

    def _hold(self) -> None:
        """Set the values of the lost ranks to zero."""
        assert self.masks is not None
        for name, layer in self._layers.items():
            kept = torch.tensor(self.masks[name], device=layer.lora_E.device)
            layer.lora_E.masked_fill_(~kept[:, None], 0.0)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{name}.{below}", parameter)
            for name, layer in self._layers.items()
            for below, parameter in layer.tensors().items()
        ]


def adalora_layers(model: nn.Module) -> dict[str, AdaLoRALinear]:
    """The model's AdaLoRA layers by their paths."""
    layers = require_adapter(model).items()
    return {name: layer for name, layer in layers if isinstance(layer, AdaLoRALinear)}


def fold_into_lora(model: nn.Module) -> None:
    """Make a model's AdaLoRA a plain LoRA that computes the same, in place.

    A' = A * E, B' = scaling * B; ranks by layer in rank_pattern, and alpha_pattern the same, so
    that every scale is 1. Layers without a rank lose their adapter. A value that is zero (a rank
    that is lost, before `finish`) is left out too.

    Raises:
        AdapterError: no AdaLoRA there, it is merged, or no layer has a rank left.
    """
    layers = adalora_layers(model)
    config = adapter_config(model)
    kept = {name: layer.lora_E.detach()[:, 0] != 0 for name, layer in layers.items()}
    ranks = {name: int(mask.sum()) for name, mask in kept.items() if mask.any()}
    if not ranks:
        raise AdapterError(
            "the model's adapter is no AdaLoRA, or no layer has a rank left"
            "; give a model with a trained AdaLoRA"
        )
    if any(layer.merged is not None for layer in layers.values()):
        raise AdapterError("the adapter is merged; unmerge_adapter(model) first")
    for name, layer in layers.items():
        plain = _plain(layer, kept[name]) if name in ranks else layer.base_layer
        replace_module(model, name, plain.train(layer.training))
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoRAConfig)}
    values |= {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": dict(others)}
    values |= {"target_modules": list(ranks), "exclude_modules": None}
    values |= {"layers_to_transform": None, "layers_pattern": None}
    attach_config(model, LoRAConfig(**values))


def _plain(layer: AdaLoRALinear, kept: Tensor) -> AdapterLayer:
    """The layer's kept ranks (a mask, (r,)) as a LoRALinear."""
    plain = LoRALinear(layer.base_layer, int(kept.sum()), 1.0, layer.dropout)
    plain.lora_A.data.copy_(layer.factors()[0].detach()[kept])
    plain.lora_B.data.copy_(layer.lora_B.detach()[:, kept] * layer.scaling)
    for parameter in plain.tensors().values():
        parameter.requires_grad_(layer.lora_A.requires_grad)
    plain.enabled = layer.enabled
    return plain
