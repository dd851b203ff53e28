"""PEFT's further keys for LoRA: kept, passed over, or refused by name. No torch.

PEFT's LoraConfig (0.21.2) has some fifty keywords. What lorax computes with stands in config.py;
the others are here, so that a line copied from a notebook runs and a file of any PEFT reads:

    kept         task_type, revision, ...       describe the adapter; written down again
    not covered  use_qalora, kasa_config, ...   change what is computed; only at rest
    unknown      of other programs              passed over, as PEFT does, unless they would act

At rest is what asks for nothing: the default, null, or an empty list or object.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from lorax.errors import AdapterError

log = logging.getLogger("lorax")

# Keys that say nothing about the result, of every kind of adapter.
DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
# What other programs and early PEFTs write beside PEFT's keys, about training or about files.
_ELSEWHERE = re.compile(
    r"(merge_weights|.*dtype|.*_lr|.*_lr_ratio|loraplus_.*|lorap_.*|.*unsloth.*|.*_version|.*_path"
    r"|model_type|library_name|use_gradient_checkpointing|use_cache|use_safetensors)"
)
# How the names of keys that act begin and end.
_ACTS = re.compile(
    r"(use|enable|do)_.*|.*_(config|pattern|parameters|modules|replication|tokens)|modules_to_save"
)


@dataclass(frozen=True)
class AdapterConfig:
    """What every variant's config is: a frozen dataclass that a file's keys make.

    It has a `peft_type`, a field or a class's attribute: what adapter_config.json says it is.
    """

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter") -> Self:
        """Build from adapter_config.json's keys; `where` opens an error's message."""
        raise NotImplementedError

    def check_start(self) -> None:
        """Refuse a start that only a loaded adapter can have had."""

    def declared(self) -> tuple[int, str] | None:
        """How many values an adapter has whose size the model does not decide, and by what key."""
        return None

    def for_file(self, base: str | None) -> Self:
        """What is written down over the base of that name."""
        return self


@dataclass(frozen=True, kw_only=True)
class PeftKeywords(AdapterConfig):
    """The keywords of PEFT's LoraConfig that lorax keeps or does not cover; meaning as in PEFT.

    task_type: what the model is for, "CAUSAL_LM"; PEFT's enum is taken, too.
    eva_config, corda_config, lora_ga_config: how A and B started; nothing once they are trained.
    inference_mode, runtime_config, megatron_core, qalora_group_size: taken, and of no effect.
    """

    task_type: str | None = field(default=None, compare=False, repr=False)
    peft_type: str = field(default="LORA", compare=False, repr=False)
    auto_mapping: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    base_model_name_or_path: str | None = field(default=None, compare=False, repr=False)
    revision: str | None = field(default=None, compare=False, repr=False)
    inference_mode: bool = field(default=False, compare=False, repr=False)
    peft_version: str | None = field(default=None, compare=False, repr=False)
    runtime_config: Any = field(default=None, compare=False, repr=False)
    eva_config: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    corda_config: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    lora_ga_config: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    megatron_core: str | None = field(default="megatron.core", compare=False, repr=False)
    qalora_group_size: int = field(default=16, compare=False, repr=False)

    alora_invocation_tokens: Any = field(default=None, compare=False, repr=False)
    arrow_config: Any = field(default=None, compare=False, repr=False)
    kasa_config: Any = field(default=None, compare=False, repr=False)
    layer_replication: Any = field(default=None, compare=False, repr=False)
    megatron_config: Any = field(default=None, compare=False, repr=False)
    monteclora_config: Any = field(default=None, compare=False, repr=False)
    target_parameters: Any = field(default=None, compare=False, repr=False)
    use_bdlora: Any = field(default=None, compare=False, repr=False)
    use_qalora: bool = field(default=False, compare=False, repr=False)
    velora_config: Any = field(default=None, compare=False, repr=False)

    def _settle_keywords(self) -> None:
        """Put defaults where null or nothing stands, and refuse what is not covered."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            default = default_of(each)
            if each.name in NOT_COVERED and value:
                raise AdapterError(f"{each.name} = {value!r} is not covered by lorax; leave it out")
            nothing = value is None or (_is_empty(value) and each.name != "target_modules")
            if nothing or each.name == "peft_type":  # PEFT too overwrites the latter
                object.__setattr__(self, each.name, default)
        for name in ("task_type", "eva_config", "corda_config", "lora_ga_config"):
            object.__setattr__(self, name, _plain(getattr(self, name)))


KEPT = {each.name for each in dataclasses.fields(PeftKeywords)}
NOT_COVERED = {
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
}


def default_of(each: dataclasses.Field[Any]) -> Any:
    """A field's default; None where it has none."""
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return None if each.default is dataclasses.MISSING else each.default


def check_unknown(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """What a file's keys that PEFT does not have ask for: nothing, and the log names them.

    Raises:
        AdapterError: one is near a key that PEFT has, or its name says that it acts.
    """
    passed = []
    for key, value in values.items():
        if key in known or key in DESCRIPTIVE or not value:
            continue
        near = difflib.get_close_matches(key, known, 1, 0.6)
        typo = bool(difflib.get_close_matches(key, known, 1, 0.85))
        acts = _ACTS.fullmatch(key) and not isinstance(value, str)
        if (typo or acts) and not _ELSEWHERE.fullmatch(key):
            hint = f"; did you mean {near[0]}?" if near else ""
            raise AdapterError(f"{where}: {key} = {value!r} is unknown{hint}")
        passed.append(key)
    if passed:
        log.warning("%s: %s: no keys of PEFT's, passed over", where, ", ".join(sorted(passed)))


@contextmanager
def opening_with(where: str) -> Iterator[None]:
    """A value that is refused in here is named with its place."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from None


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | tuple | set | dict) and not value


def _plain(value: Any) -> Any:
    """An enum's value, a dataclass as a dict; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", value)
