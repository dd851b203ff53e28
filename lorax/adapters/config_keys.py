"""What every adapter's config is, and PEFT's further keywords for LoRA. No torch.

PEFT's LoraConfig (0.21.2) has some fifty keywords. What lorax computes with stands in config.py;
the others are here, so that a line copied from a notebook runs and a file of any PEFT reads:

    kept         task_type, revision, ...       describe the adapter; written down again
    not covered  use_qalora, kasa_config, ...   change what is computed; only at rest

At rest is what asks for nothing: the default, null, or an empty list or object. What a file says
beside these, config_files.py judges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


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
    The last ten change what is computed: only at rest (NOT_COVERED, config_files.py).
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


KEPT = {each.name for each in dataclasses.fields(PeftKeywords)}
