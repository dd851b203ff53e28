"""What is added to each optimizer step, by a method or by a researcher's own file. No torch.

    class LogNorms(StepHook):
        def __init__(self, model):
            self.model = model
        def after_step(self):
            return {"norm": self.model.get_parameter("lm_head.weight").norm().item()}

    lorax.register_step_hook("log-norms", LogNorms)

Then a recipe says `train.hooks = ["log-norms"]`, or a program `lorax.train(..., hooks=[LogNorms])`.
What the constructor takes beside the model, a recipe gives in `[hooks.log-norms]`
(hook_settings.py), a program with functools.partial.
What a hook gives stands in metrics.jsonl; what its `state` gives is in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorax.errors import PluginError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Line = dict[str, Any]
# (the model, adapter included; its settings by name) -> a hook
HookFactory = Callable[..., "StepHook"]


class StepHook:
    """What a method adds to each optimizer step; a plain one adds nothing."""

    def penalty(self) -> Tensor | None:
        """Added once to what is differentiated, () float32; the logged loss is the rows' alone."""
        return None

    def after_step(self) -> Line:
        """The optimizer has moved, the gradients are still there. Gives more for metrics.jsonl."""
        return {}

    def skip_step(self) -> None:
        """The step was left out, because its loss or gradient was no number."""

    def finish(self) -> None:
        """The last step is done; the adapter is saved next."""

    def state(self) -> tuple[Line, dict[str, Tensor]]:
        """What a checkpoint has to keep of it: plain numbers, and tensors by name."""
        return {}, {}

    def load_state(self, numbers: Line, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""


class SeveralHooks(StepHook):
    """The method's own hook and those beside it, by name, in their order."""

    def __init__(self, hooks: Mapping[str, StepHook]):
        self.hooks = dict(hooks)

    def penalty(self) -> Tensor | None:
        """The sum of those there are."""
        found = [p for p in (hook.penalty() for hook in self.hooks.values()) if p is not None]
        return sum(found[1:], found[0]) if found else None

    def after_step(self) -> Line:
        """All that they give.

        Raises:
            PluginError: two give the same name.
        """
        line: Line = {}
        for name, hook in self.hooks.items():
            found = hook.after_step()
            for key in sorted(line.keys() & found.keys()):
                raise PluginError(
                    f"step hook {name!r}: after_step gives {key!r}, which another hook gives too; "
                    "take another name"
                )
            line |= found
        return line

    def skip_step(self) -> None:
        """Tell all."""
        for hook in self.hooks.values():
            hook.skip_step()

    def finish(self) -> None:
        """Tell all."""
        for hook in self.hooks.values():
            hook.finish()

    def state(self) -> tuple[Line, dict[str, Tensor]]:
        """{name: numbers}, and tensors as "name/tensor"."""
        states = {name: hook.state() for name, hook in self.hooks.items()}
        tensors = {f"{name}/{key}": t for name, (_, ts) in states.items() for key, t in ts.items()}
        return {name: numbers for name, (numbers, _) in states.items()}, tensors

    def load_state(self, numbers: Line, tensors: dict[str, Tensor]) -> None:
        """Give each hook its own part of what `state` gave."""
        for name, hook in self.hooks.items():
            start = f"{name}/"
            own = {
                key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)
            }
            hook.load_state(numbers.get(name, {}), own)


_factories: dict[str, HookFactory] = {}


def register_step_hook(name: str, factory: HookFactory) -> None:
    """Add a hook that recipes can name in train.hooks, in this process.

    factory: (model, settings by name) -> StepHook; a class whose constructor takes them is one.

    Raises:
        RecipeError: the name is taken by another one.
    """
    if _factories.setdefault(name, factory) is not factory:
        raise RecipeError(f"step hook {name!r} is there already; take another name")


def check_hooks(names: list[str]) -> None:
    """Refuse a name that nobody registered, or one that stands there twice.

    Raises:
        RecipeError: the first such name.
    """
    for name in names:
        if name not in _factories:
            known = ", ".join(sorted(_factories)) or "none is registered"
            raise RecipeError(
                f"train.hooks: {name!r} is unknown ({known}); name the file that registers it in "
                "plugins, or with --plugin"
            )
        if names.count(name) > 1:
            raise RecipeError(f"train.hooks: {name!r} stands there twice; name it once")


def factory_of(name: str) -> HookFactory:
    """What makes the hook of that name, which check_hooks has found."""
    return _factories[name]


def with_hooks(
    own: StepHook,
    model: Any,
    names: list[str],
    others: list[HookFactory | StepHook],
    settings: Mapping[str, Mapping[str, Any]],
) -> StepHook:
    """The method's own hook and those that a recipe names or a program gives; itself if none.

    settings: the recipe's [hooks] table.
    """
    from lorax.training.checked_hook import CheckedHook, made
    from lorax.training.hook_settings import typed_settings

    found: dict[str, StepHook] = {}
    for name in names:
        values = typed_settings(name, settings.get(name, {}))
        found[name] = made(name, _factories[name], model, values)
    for number, other in enumerate(others):
        name = f"given-{number}"
        found[name] = other if isinstance(other, StepHook) else made(name, other, model, {})
    found = {"method": own} | {name: CheckedHook(name, hook) for name, hook in found.items()}
    return own if len(found) == 1 else SeveralHooks(found)
