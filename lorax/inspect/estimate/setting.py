"""How a model is trained, as far as memory depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.variants import UNKNOWN_STEPS
from lorax.errors import UsageError
from lorax.inspect.estimate.configs import Known
from lorax.quant import names

if TYPE_CHECKING:
    from lorax.data.examples import Example

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a value


@dataclass(frozen=True)
class Setting:
    """One way to train a model.

    adapter: None trains every weight, in float32.
    dtype: of the plain weights and of what is computed. quantization: of the Linears, or None.
    batch: rows in a forward pass; length: tokens of each, padding included.
    trained: how many of the batch's tokens are trained; None: all but each row's first.
    accumulates: whether gradients of an earlier micro-batch are there already.
    fast: whether the hand-written step of a CPU computes. device: "cpu" or "cuda".
    """

    adapter: AdapterConfig | None = field(default_factory=LoRAConfig)
    dtype: str = "float32"
    quantization: str | None = None
    optimizer: str = "adamw"
    batch: int = 1
    length: int = 512
    trained: int | None = None
    checkpointing: bool = False
    accumulates: bool = False
    fast: bool = True
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.batch * self.length

    @property
    def targets(self) -> int:
        """Tokens whose loss is computed in a forward pass."""
        return self.batch * (self.length - 1) if self.trained is None else self.trained

    @property
    def itemsize(self) -> int:
        """Bytes of a value of the model."""
        return SIZES[self.dtype]

    @property
    def method(self) -> str:
        """ "full", "lora" or "qlora"."""
        if self.adapter is None:
            return "full"
        return "lora" if self.quantization is None else "qlora"

    @property
    def line(self) -> str:
        """The setting in a few words."""
        return f"{self.words}, {self.shape}"

    @property
    def words(self) -> str:
        """How is trained."""
        words = [self.method, self.quantization or self.dtype]
        words += [f"r = {self.adapter.r}"] if isinstance(self.adapter, LoRAConfig) else []
        words += [self.optimizer] + (["checkpointing"] if self.checkpointing else [])
        return ", ".join(words)

    @property
    def shape(self) -> str:
        """What goes through the model in a pass."""
        return f"{self.batch} x {self.length} tokens"


def setting_of(method: str, dtype: str, **values: Any) -> Setting:
    """A setting by its method's name.

    Args:
        method: "full" (in float32), "lora", or "qlora" (over nf4-dq, unless quantization says
            otherwise).
        dtype: of the weights; float16, in which lorax does not train, becomes bfloat16.
        values: r, target_modules, and the fields of `Setting`.

    Raises:
        UsageError: an unknown method, optimizer, dtype or format, or a size below 1.
    """
    r, targets = values.pop("r", 8), values.pop("target_modules", None)
    quantization = values.pop("quantization", None)
    _check("--method", method, METHODS)
    _check("--optimizer", values.get("optimizer", "adamw"), OPTIMIZERS)
    _check("--dtype", dtype, tuple(SIZES))
    for name, least in (("batch", 1), ("length", 2)):
        if values.get(name, least) < least:
            raise UsageError(f"--{name} {values[name]}: expected {least} or more")
    if r < 1:
        raise UsageError(f"--r {r}: expected 1 or more")
    if method not in ("lora", "qlora"):
        return Setting(adapter=None, dtype="float32", **values)
    dtype = "bfloat16" if dtype == "float16" else dtype
    made = Setting(LoRAConfig(r=r, target_modules=targets or "all-linear"), dtype, **values)
    if method == "lora":
        return made
    quantization = quantization or "nf4-dq"
    _check("--quantization", quantization, names.formats())
    return replace(made, quantization=quantization)


def _check(option: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise UsageError(f"{option} {found}: expected {names.listed(expected)}")


def setting_of_recipe(recipe: Any, known: Known, rows: Sequence[Example] = ()) -> Setting:
    """What a recipe asks for; of its rows, where they are given, the largest micro-batch.

    Args:
        recipe: a checked `Recipe`.
        known: its model's config and files.
        rows: those that are trained on; none: rows of data.max_length, all of it trained.
    """
    model, train = recipe.model, recipe.train
    full = recipe.variant.trains_base
    dtype = known.dtype if model.dtype == "auto" else model.dtype
    batch, length, trained = _largest(recipe, rows)
    return Setting(
        adapter=recipe.adapter_config(UNKNOWN_STEPS),
        dtype="float32" if full else dtype,
        quantization=model.quantization or known.quantization,
        optimizer=train.optimizer,
        batch=batch,
        length=length,
        trained=trained,
        checkpointing=model.gradient_checkpointing,
        accumulates=train.batch_size > train.micro_batch_size,
        fast=train.fast,
        device=model.device.partition(":")[0],
    )


def _largest(recipe: Any, rows: Sequence[Example]) -> tuple[int, int, int | None]:
    """Rows, length and trained tokens of the largest micro-batch that a run can meet."""
    size, most = recipe.train.micro_batch_size, recipe.data.max_length
    if not rows:
        return size, most, None
    by_length = sorted(rows, key=lambda row: len(row.ids), reverse=True)[:size]
    longest = len(by_length[0].ids)
    if recipe.room is not None:  # as many rows of the longest's length as there is room for
        tokens = sum(len(row.ids) for row in rows)
        batch = max(1, min(recipe.room, tokens) // longest)
        return batch, longest, round(batch * longest * sum(row.tokens for row in rows) / tokens)
    return len(by_length), longest, sum(row.tokens for row in by_length)
