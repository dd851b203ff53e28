"""What a recipe's method asks of a run: what is trained, each step's extras, what is left.

Which method that is, and what it says about itself, the table of variants knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lorax.adapters.adalora.allocator import RankAllocator
from lorax.adapters.attached import adapter_layers
from lorax.adapters.full import train_everything
from lorax.adapters.inject import add_adapter
from lorax.adapters.variants import resolved
from lorax.data.tokenizer import Tokenizer
from lorax.errors import AdapterError
from lorax.formats.huggingface import load_model, save_model
from lorax.formats.peft import save_adapter
from lorax.models import Model
from lorax.training.hooks import HookFactory, Line, StepHook, with_hooks
from lorax.training.recipe import Recipe


class AdaLoRAHook(StepHook):
    """Drives the rank allocator; writes down `orthogonality` (weighted) and `mean_rank`."""

    def __init__(self, model: Model):
        self._allocator = RankAllocator(model)
        self._penalty = 0.0

    def penalty(self) -> Tensor | None:
        """The orthogonality penalty."""
        penalty = self._allocator.penalty()
        self._penalty = penalty.item()
        return penalty

    def after_step(self) -> Line:
        """Let the allocator watch and deal out."""
        self._allocator.update()
        ranks = self._allocator.ranks.values()
        return {"orthogonality": self._penalty, "mean_rank": sum(ranks) / len(ranks)}

    def skip_step(self) -> None:
        """The step counts, but its gradient says nothing about the ranks."""
        self._allocator.update(watch=False)

    def finish(self) -> None:
        """Take the lost ranks out."""
        self._allocator.finish()

    def state(self) -> tuple[Line, dict[str, Tensor]]:
        """The allocator's step, ranks and averages."""
        return self._allocator.state()

    def load_state(self, numbers: Line, tensors: dict[str, Tensor]) -> None:
        """Set the allocator to what `state` gave."""
        self._allocator.load_state(numbers, tensors)


def set_up(
    model: Model,
    tokenizer: Tokenizer,
    recipe: Recipe,
    total_steps: int,
    hooks: Sequence[HookFactory | StepHook] = (),
) -> StepHook:
    """Make trainable what the recipe's method trains, and make the hooks of its steps.

    Raises:
        RecipeError, AdapterError: it does not fit the model or the steps.
    """
    config = recipe.adapter_config(total_steps)
    if config is None:
        train_everything(model)
    else:
        add_adapter(model, config, tokenizer)
        _check_saved(model)
    factory = resolved(recipe.variant.hook) or _nothing
    named = recipe.train.hooks
    return with_hooks(factory(model), model, named, list(hooks), recipe.hooks or {})


def _check_saved(model: Model) -> None:
    """Refuse a layer that trains what its files would not hold.

    Raises:
        AdapterError: the first such parameter.
    """
    layers = adapter_layers(model)
    saved = {id(t) for layer in layers.values() for t in layer.tensors().values()}  # some share
    for name, layer in layers.items():
        frozen = {id(parameter) for parameter in layer.base_layer.parameters()}
        for below, parameter in layer.named_parameters():
            if parameter.requires_grad and id(parameter) not in saved | frozen:
                raise AdapterError(
                    f"{name}: {below} is trained, and {type(layer).__name__}.tensors() does not "
                    "name it, so it would be lost; add it there"
                )


def _nothing(model: Model) -> StepHook:
    return StepHook()


def model_dtype(recipe: Recipe) -> str:
    """What the model is loaded in: full fine-tuning trains float32 weights."""
    return "float32" if recipe.variant.trains_base else str(recipe.model.dtype)


def load_base(recipe: Recipe) -> Model:
    """The base model as the recipe's [model] says."""
    settings = recipe.model
    return load_model(
        settings.path,
        model_dtype(recipe),
        settings.device,
        settings.quantization,
        revision=settings.revision,
    )


def save_result(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """Write what was trained: the adapter, or the model with its tokenizer."""
    if adapter_layers(model):
        save_adapter(model, path)
    else:
        save_model(model, path, tokenizer=tokenizer)
