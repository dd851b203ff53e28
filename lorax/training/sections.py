"""The tables of a recipe and their keys: type, bounds, default and meaning of each.

docs/recipe.md is made from them. [adapter] is not here: its keys are those of its method's config
(recipe.py).
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lorax.data.kinds import Column
from lorax.quant import names


class Section(BaseModel):
    """A table of the recipe: unknown keys are errors, values are fixed once checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the home directory


def _known_format(name: str) -> str:
    """The name of a format, a registered codebook's included."""
    if name not in names.formats():
        expected = names.listed(tuple(map(repr, names.formats())))
        raise PydanticCustomError("format", "Input should be {expected}", {"expected": expected})
    return name


Quantization = Annotated[str, AfterValidator(_known_format)]


class ModelSection(Section):
    """[model]: the base model, and in which numbers it is loaded."""

    path: LocalPath = Field(description="Directory, Hub id or .gguf file.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the plain weights; auto: as the checkpoint has it."
    )
    device: str = Field("cpu", description="cpu, cuda or cuda:N.")
    quantization: Quantization | None = Field(
        None, description="Quantize the frozen Linears while loading; none: plain weights."
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Recompute activations in the backward pass: less memory, more time; "
        "selective: the cheap ones.",
    )


class DataSection(Section):
    """[data]: which rows, and how long."""

    path: LocalPath = Field(description="The rows: .jsonl, .json, .csv or .parquet.")
    eval_path: LocalPath | None = Field(None, description="Held-out rows from a file of their own.")
    columns: dict[Column, str] | None = Field(
        None, description="lorax's column names to the file's: { prompt = 'ask' }."
    )
    eval_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the rows that is held out and evaluated on."
    )
    max_length: int = Field(
        512, ge=2, description="Tokens of a row; longer rows are cut at the end."
    )
    shuffle: bool = Field(True, description="A new order of rows each epoch, from train.seed.")
    packing: bool = Field(
        False,
        description="Put a step's rows behind each other in the place of padding them, each by "
        "itself: the same steps and results, faster. A forward pass then holds "
        "train.micro_batch_size sequences of max_length tokens, as many rows as fit.",
    )
    group_by_length: bool = Field(
        False,
        description="Let rows of like length share a step, so that less is padding: another order "
        "of the same rows.",
    )


def _at_most_four_rows(settings: dict[str, Any]) -> int:
    return min(4, settings["batch_size"])


class TrainSection(Section):
    """[train]: how long, how fast, where to."""

    output_dir: LocalPath = Field(description="The run's directory; must be missing or empty.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows; fractions are allowed.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; where given, epochs is not used."
    )
    batch_size: int = Field(16, ge=1, description="Rows in an optimizer step, packed or not.")
    micro_batch_size: int = Field(
        default_factory=_at_most_four_rows,
        ge=1,
        description="Rows in one forward pass: memory and speed, not the result. By default 4, or "
        "batch_size if that is less.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="The peak, after the warm-up.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls after the warm-up: to zero, or not at all."
    )
    warmup_ratio: float = Field(
        0.05, ge=0.0, lt=1.0, description="Share of the steps in which the rate climbs."
    )
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled, as in AdamW.")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Clip the gradient's norm; 0: never.")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = Field(
        "adamw", description="State in 32 or 8 bits; paged: in managed memory on CUDA."
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the second moment's root.")
    lora_plus_ratio: float | None = Field(
        None, gt=0, description="LoRA+: B's learning rate over A's."
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Evaluate every so many steps; else at start and end."
    )
    save_steps: int = Field(
        100, ge=0, description="A checkpoint every so many steps; 0: only on a signal."
    )
    keep_checkpoints: int | None = Field(
        2, ge=1, description="The newest that stay; older ones are removed."
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="Stop after so many evaluations without a lower loss; 0: never."
    )
    hooks: list[str] = Field(
        default_factory=list, description="Step hooks that plugins register, by name, in order."
    )
    nan_policy: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="At a loss or gradient that is not finite: end the run, leave the step out, or "
        "go back to the last checkpoint as well.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Under torchrun: the whole base on every process, or its layers in shards.",
    )
    fast: bool = Field(
        True, description="On a CPU the hand-written step (training/fast): equal but for rounding."
    )
    loggers: list[Literal["tensorboard", "trackio"]] = Field(
        default_factory=list, description="Where the numbers of metrics.jsonl go as well."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of rows, initialization and dropout.")
    digests: bool = Field(False, description="A digest of each step, for `lorax inspect diff`.")


class RuntimeSection(Section):
    """[runtime]: what `lorax train` sets for its process; the library leaves the process alone."""

    threads: int = Field(
        0, ge=0, description="That compute; 0: as OMP_NUM_THREADS or the machine says."
    )
