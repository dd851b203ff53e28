"""What each method of [adapter] asks of a run: what is trained, each step's extras, what is left.

method           trained                      a step's extras             the run leaves
lora             A and B                      -                           adapter/
adalora          A, B and E, fewer by steps   penalty; ranks dealt out    adapter/
prompt-tuning    the virtual tokens           -                           adapter/
full             every parameter, float32     -                           model/
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lorax.adapters.adalora import AdaLoRAConfig
from lorax.adapters.inject import adapter_layers, add_adapter
from lorax.adapters.rank_allocator import RankAllocator
from lorax.data.tokenizer import Tokenizer
from lorax.errors import RecipeError
from lorax.formats.huggingface import save_model
from lorax.formats.peft import save_adapter
from lorax.models import Model
from lorax.quant.linear import QuantizedLinear
from lorax.training.metrics import Line
from lorax.training.recipe import Recipe


class StepHook:
    """What a method adds to each optimizer step; a plain one adds nothing."""

    def penalty(self) -> Tensor | None:
        """Added once to the step's loss, () float32; None for nothing."""
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


class AdaLoRAHook(StepHook):
    """Drives the rank allocator; writes down `orthogonality` (weighted) and `mean_rank`."""

    def __init__(self, allocator: RankAllocator):
        self._allocator = allocator
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
        """See `state`."""
        self._allocator.load_state(numbers, tensors)


def set_up(model: Model, tokenizer: Tokenizer, recipe: Recipe, total_steps: int) -> StepHook:
    """Make trainable what the recipe's method trains.

    Raises:
        RecipeError, AdapterError: it does not fit the model or the steps.
    """
    config = recipe.adapter_config(total_steps)
    if config is None:
        _train_everything(model)
        return StepHook()
    add_adapter(model, config, tokenizer)
    return AdaLoRAHook(RankAllocator(model)) if isinstance(config, AdaLoRAConfig) else StepHook()


def _train_everything(model: Model) -> None:
    quantized = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if quantized:
        raise RecipeError(
            f"model.path: its checkpoint is quantized ({quantized[0]} and {len(quantized) - 1} "
            "more), and quantized weights are frozen; adapter.method = 'full' needs plain ones"
        )
    model.loaded_from = None  # its weights will be those of no file
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def model_dtype(recipe: Recipe) -> str:
    """What the model is loaded in: full fine-tuning trains float32 weights."""
    return "float32" if recipe.adapter.method == "full" else str(recipe.model.dtype)


def save_result(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """Write what was trained: the adapter, or the model with its tokenizer."""
    if adapter_layers(model):
        save_adapter(model, path)
    else:
        save_model(model, path, tokenizer=tokenizer)
