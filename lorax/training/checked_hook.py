"""A step hook of somebody's own, whose answers are looked at before the run goes on with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorax.errors import PluginError
from lorax.plugins import where_it_failed
from lorax.training.hooks import HookFactory, Line, StepHook

# What a run writes down of a step or an evaluation itself.
TAKEN = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}
TAKEN |= {"eval_loss", "eval_perplexity", "not_finite"}
_PLAIN = (bool, int, float, str, type(None))


def made(name: str, factory: HookFactory, model: Any, settings: Mapping[str, Any]) -> StepHook:
    """What the factory makes for a model, adapter included.

    Raises:
        PluginError: it fails, or makes no StepHook.
    """
    try:
        hook = factory(model, **settings)
    except Exception as error:  # whatever the user's own code raises
        raise PluginError(
            f"step hook {name!r} cannot be made ({where_it_failed(error)}); mend it, or leave it "
            "out"
        ) from error
    if not isinstance(hook, StepHook):
        raise PluginError(f"step hook {name!r} is {repr(hook)[:80]}; expected a lorax.StepHook")
    return hook


class CheckedHook(StepHook):
    """The hook of that name; what it raises, or gives that cannot be used, is a PluginError.

    Its `state` is asked for once at the start, so that a run does not fail at its first checkpoint.
    """

    def __init__(self, name: str, hook: StepHook):
        self.name, self.hook = name, hook
        self.state()

    def penalty(self) -> Tensor | None:
        """Its penalty: () with a gradient, or None."""
        found = self._call(self.hook.penalty)
        if found is None:
            return None
        if not isinstance(found, Tensor) or found.dim() or not found.requires_grad:
            raise self._problem("penalty", found, "a () tensor with a gradient, or None")
        return found

    def after_step(self) -> Line:
        """Its numbers, under names that the run does not use."""
        found = self._call(self.hook.after_step)
        if not isinstance(found, dict) or not all(isinstance(v, _PLAIN) for v in found.values()):
            raise self._problem("after_step", found, "{name: number}; a tensor's is tensor.item()")
        for key in sorted(TAKEN & found.keys()):
            raise PluginError(
                f"step hook {self.name!r}: after_step gives {key!r}, which the run writes itself; "
                "take another name"
            )
        return found

    def skip_step(self) -> None:
        """Tell it."""
        self._call(self.hook.skip_step)

    def finish(self) -> None:
        """Tell it."""
        self._call(self.hook.finish)

    def state(self) -> tuple[Line, dict[str, Tensor]]:
        """Its numbers by name, and its tensors."""
        found = self._call(self.hook.state)
        match found:
            case (dict() as numbers, dict() as tensors):
                plain = all(isinstance(key, str) for key in (*numbers, *tensors))
                if plain and _is_json(numbers) and all(map(torch.is_tensor, tensors.values())):
                    return numbers, tensors
        raise self._problem("state", found, "({name: number}, {name: tensor})")

    def load_state(self, numbers: Line, tensors: dict[str, Tensor]) -> None:
        """Give the hook back what its `state` gave."""
        self._call(self.hook.load_state, numbers, tensors)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:  # whatever the user's own code raises
            raise PluginError(
                f"step hook {self.name!r}: {method.__name__} failed ({where_it_failed(error)}); "
                "mend it, or leave it out"
            ) from error

    def _problem(self, method: str, found: Any, expected: str) -> PluginError:
        return PluginError(
            f"step hook {self.name!r}: {method} gives {repr(found)[:80]}; expected {expected}"
        )


def _is_json(value: Any) -> bool:
    """Whether it reads back from a file of JSON as it is."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, _PLAIN)
