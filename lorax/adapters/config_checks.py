"""The checks of a LoRAConfig: every value that is impossible, or that PEFT does not define."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorax.adapters.config import LOST, SETTLED
from lorax.adapters.config_files import NOT_COVERED, default_of, log
from lorax.adapters.matching import is_plain
from lorax.errors import AdapterError

if TYPE_CHECKING:
    from lorax.adapters.config import LoRAConfig

MAX_RANK = 2**16  # above any layer's width; a stranger's config may ask for anything
MAX_LOFTQ_ITERATIONS = 100  # each decomposes every weight; LoftQ's authors take 5
MAX_EXPRESSIONS = 1000  # in one config


def check_config(config: LoRAConfig) -> None:
    """Settle the values of a config that is being made, and refuse impossible ones.

    Raises:
        AdapterError: the field, its value, and what was expected.
    """
    if config.init_lora_weights is None:  # PEFT draws both then
        object.__setattr__(config, "init_lora_weights", False)
    settle_keywords(config)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, key)
        if value is not None and not isinstance(value, str | list):
            object.__setattr__(config, key, sorted(value))  # PEFT's users pass sets and tuples
    check_rank("r", config.r)
    _check_alpha("lora_alpha", config.lora_alpha)
    config.check_rank_pattern()
    for name, alpha in config.alpha_pattern.items():
        _check_alpha(f"alpha_pattern[{name!r}]", alpha)
    if not 0.0 <= config.lora_dropout < 1.0:
        raise AdapterError(f"lora_dropout is {config.lora_dropout}; expected 0 <= p < 1")
    if config.bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"bias is {config.bias!r}; expected none, all or lora_only")
    _check_names("modules_to_save", config.modules_to_save)
    _check_indices(config.trainable_token_indices)
    _check_word(config)
    _check_loftq(config)
    how = config.init_lora_weights
    if config.use_dora and (how == "loftq" or config.starts_inside):
        raise AdapterError(
            f"use_dora with init_lora_weights = {how!r} is not covered by lorax"
            "; leave one of them out"
        )
    if config.lora_bias and (config.use_dora or not isinstance(how, bool)):
        other = "use_dora" if config.use_dora else f"init_lora_weights = {how!r}"
        raise AdapterError(
            f"lora_bias and {other}: PEFT does not define the two together; leave one of them out"
        )
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise AdapterError(
            "layers_to_transform goes with target_modules as a list of names"
            "; give a list, or leave layers_to_transform out"
        )
    _check_expressions(config)


def settle_keywords(config: LoRAConfig) -> None:
    """Put defaults where null or nothing stands, and refuse what is not covered.

    Raises:
        AdapterError: a keyword of PEFT's that would change what is computed.
    """
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        default = default_of(each)
        if each.name in NOT_COVERED and value:
            raise AdapterError(f"{each.name} = {value!r} is not covered by lorax; leave it out")
        nothing = value is None or (_is_empty(value) and each.name != "target_modules")
        if nothing or each.name == "peft_type":  # PEFT too overwrites the latter
            object.__setattr__(config, each.name, default)
    for name in ("task_type", "eva_config", "corda_config", "lora_ga_config"):
        object.__setattr__(config, name, _plain(getattr(config, name)))


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | tuple | set | dict) and not value


def _plain(value: Any) -> Any:
    """An enum's value, a dataclass as a dict; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return getattr(value, "value", value)


def check_start(config: LoRAConfig) -> None:
    """Refuse a start that only a loaded adapter can have had.

    Raises:
        AdapterError: init_lora_weights is one of SETTLED or LOST.
    """
    if config.init_lora_weights in (*SETTLED, *LOST):
        raise AdapterError(
            f"init_lora_weights = {config.init_lora_weights!r}: lorax loads such an adapter, and "
            "starts none; take true, 'gaussian', 'pissa', 'olora' or 'loftq'"
        )


def check_ranks(pattern: Mapping[str, Any]) -> None:
    """Refuse a rank in rank_pattern that is none."""
    for name, rank in pattern.items():
        check_rank(f"rank_pattern[{name!r}]", rank)


def _check_word(config: LoRAConfig) -> None:
    """Spell init_lora_weights as PEFT understands it; refuse words that it does not have."""
    how = config.init_lora_weights
    lower = how.lower() if isinstance(how, str) else how
    if lower in ("gaussian", "olora", "mica"):  # PEFT takes these in any case
        object.__setattr__(config, "init_lora_weights", lower)
    elif not (isinstance(how, bool) or how in ("loftq", *SETTLED, *LOST) or config.starts_inside):
        raise AdapterError(
            f"init_lora_weights is {how!r}; lorax covers true, false, 'gaussian', 'pissa', "
            f"'pissa_niter_K', 'olora' and 'loftq', and loads {', '.join((*SETTLED, *LOST))}; "
            "take one of these"
        )


def _check_loftq(config: LoRAConfig) -> None:
    """Fill in PEFT's defaults, refuse what is not covered."""
    if config.init_lora_weights != "loftq":
        if config.loftq_config:
            log.warning("loftq_config does nothing without init_lora_weights = 'loftq'")
            object.__setattr__(config, "loftq_config", {})
        return
    stated = config.loftq_config
    stated = stated if isinstance(stated, dict) else vars(stated)  # PEFT's LoftQConfig
    settings = {"loftq_bits": 4, "loftq_iter": 1, **stated}
    unknown = sorted(set(settings) - {"loftq_bits", "loftq_iter", "loftq_format"})
    if unknown:
        raise AdapterError(
            f"loftq_config: {unknown} unknown; expected loftq_bits, loftq_iter; leave the "
            "others out"
        )
    if settings["loftq_bits"] != 4:
        found = settings["loftq_bits"]
        raise AdapterError(f"loftq_bits is {found!r}; lorax covers 4 (NF4); give 4")
    check_rank("loftq_iter", settings["loftq_iter"], MAX_LOFTQ_ITERATIONS)
    if settings.get("loftq_format", "nf4") not in ("nf4", "nf4-dq"):
        found = settings["loftq_format"]
        raise AdapterError(f"loftq_format is {found!r}; expected 'nf4' or 'nf4-dq'")
    object.__setattr__(config, "loftq_config", settings)


def _check_expressions(config: LoRAConfig) -> None:
    """A broken expression is an error here, not somewhere in a search."""
    plain = (config.target_modules, config.exclude_modules)
    layers = config.layers_pattern or []
    used = {expression: expression for expression in plain if isinstance(expression, str)}
    used |= {
        key: rf"(.*\.)?({key})$" for key in (*(config.rank_pattern or ()), *config.alpha_pattern)
    }
    used |= {p: rf".*\.{p}\." for p in ([layers] if isinstance(layers, str) else layers)}
    used |= {m: rf"(^|.*\.){m}($|\..*)" for m in config.modules_to_save or []}
    hard = [expression for expression in used if not is_plain(expression)]
    if len(hard) > MAX_EXPRESSIONS:
        raise AdapterError(
            f"{len(hard)} regular expressions; expected at most {MAX_EXPRESSIONS}, or plain names; "
            "join them by |, or list names"
        )
    for expression in hard:
        from lorax.adapters.expressions import check_expression

        check_expression(expression, used[expression])


def check_rank(name: str, rank: Any, highest: int = MAX_RANK) -> None:
    """Refuse what is no whole number from 1 to `highest`."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= highest:
        raise AdapterError(f"{name} is {rank!r}; expected a whole number from 1 to {highest}")


def _check_alpha(name: str, alpha: Any) -> None:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{name} is {alpha!r}; expected a finite number")


def _check_names(key: str, names: Any) -> None:
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise AdapterError(f"{key} is {names!r}; expected a list of names")


def _check_indices(indices: Any) -> None:
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    for rows in lists:
        whole = isinstance(rows, list) and all(type(row) is int for row in rows)
        if not whole:
            raise AdapterError(
                f"trainable_token_indices has {rows!r}; expected a list of whole numbers"
            )
