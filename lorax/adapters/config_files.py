"""The keys of an adapter_config.json that its config does not know: passed over, or refused.

PEFT passes over what other programs write beside its keys, and so does lorax, unless the name says
that it would act, or is nearly one that there is. No torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorax.adapters.config_keys import AdapterConfig
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
# Those of LoRA that change what is computed, and of which lorax computes none.
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
# What other programs and early PEFTs write beside PEFT's keys, about training or about files.
_ELSEWHERE = re.compile(
    r"(merge_weights|.*dtype|.*_lr|.*_lr_ratio|loraplus_.*|lorap_.*|.*unsloth.*|.*_version|.*_path"
    r"|model_type|library_name|use_gradient_checkpointing|use_cache|use_safetensors)"
)
# How the names of keys that act begin and end.
_ACTS = re.compile(
    r"(use|enable|do)_.*|.*_(config|pattern|parameters|modules|replication|tokens)|modules_to_save"
)


def known_values(
    kind: type[AdapterConfig], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Of a file's keys those that a config of this kind has.

    Raises:
        AdapterError: a key that PEFT does not have, or one that is not covered and asks for
            something; it opens with `where`.
    """
    known = {each.name for each in dataclasses.fields(kind)}
    for key in NOT_COVERED:
        if values.get(key):
            found = f"{key} = {values[key]!r}"
            raise AdapterError(f"{where}: {found} is not covered by lorax; leave the key out")
    check_unknown(values, known, where)
    return {key: value for key, value in values.items() if key in known}


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
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise AdapterError(f"{where}: {key} = {value!r} is unknown; {hint}")
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
