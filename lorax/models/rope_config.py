"""How config.json speaks of rotary positions: two dialects, and a name for each way of stretching.

    transformers 5      "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    transformers 4      "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}
    before 4.43         the same with "type"

Where both stand, rope_scaling counts, unless it is null or empty; a theta inside counts before one
outside. So transformers 5.23 reads them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lorax.errors import FormatError, UnsupportedModel
from lorax.models.config_values import flag, number, size
from lorax.models.stretching import DynamicScaling, Llama3Scaling, LongRopeScaling, YarnScaling

if TYPE_CHECKING:
    from lorax.models.llama_config import LlamaConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")


def read_rope(values: dict[str, Any], head_dim: int, where: str) -> dict[str, Any]:
    """The fields of a LlamaConfig that say how positions turn.

    Raises:
        UnsupportedModel: another rope_type. FormatError: a key is missing or impossible.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: rope_scaling must be an object, found {rope!r}")
    kind = _kind(rope, ROPE_TYPES, where)
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if kind != "default" and part not in (None, 1.0):  # "default" does not look at it
        raise UnsupportedModel(
            f"{where}: partial_rotary_factor {part!r} is not covered; 1.0 is; take another model"
        )
    holder = rope if "rope_theta" in rope else {"rope_theta": 10000.0, **values}
    theta = number(holder, "rope_theta", where)
    result: dict[str, Any] = {"rope_theta": theta}
    trained = size(values, "max_position_embeddings", where)
    if kind == "linear":
        result["rope_factor"] = number(rope, "factor", where)
    elif kind == "dynamic":
        if head_dim < 4:
            raise FormatError(
                f"{where}: rope_type dynamic needs heads wider than {head_dim}; expected 4 or "
                "more; "
                "mend head_dim or rope_type"
            )
        result["dynamic_scaling"] = DynamicScaling(number(rope, "factor", where), trained)
    elif kind != "default":
        holder = values if "original_max_position_embeddings" in values else rope
        stated = {"original_max_position_embeddings": trained, **holder}
        original = size(stated, "original_max_position_embeddings", where)
        if kind == "llama3":
            result["llama3_scaling"] = _llama3(rope, original, where)
        else:
            result["yarn_scaling"] = _yarn(rope, theta, trained, original, where)
    return result


def read_longrope(values: dict[str, Any], head_dim: int, where: str) -> dict[str, Any]:
    """Phi-3's: "longrope" or none, in a part of each head.

    Its files call it "su" and "yarn", too; original_max_position_embeddings stands outside.

    Raises:
        UnsupportedModel: another rope_type. FormatError: a key is missing or impossible.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: rope_scaling must be an object, found {rope!r}")
    kind = _kind(rope, ("default", "longrope", "su", "yarn"), where)
    part = number({"partial_rotary_factor": 1.0, **values, **rope}, "partial_rotary_factor", where)
    holder = rope if "rope_theta" in rope else {"rope_theta": 10000.0, **values}
    result: dict[str, Any] = {
        "rope_theta": number(holder, "rope_theta", where),
        "partial_rotary_factor": part,
    }
    turns = int(head_dim * part)
    if part > 1 or turns < 2 or turns % 2:
        raise FormatError(
            f"{where}: partial_rotary_factor {part} of heads of width {head_dim}; expected a share "
            "that gives an even width of at least 2"
        )
    if kind == "default":
        return result
    trained = size(values, "max_position_embeddings", where)
    original = size(values, "original_max_position_embeddings", where)
    factor = number(rope, "factor", where, null=trained / original)
    waves = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    result["longrope_scaling"] = LongRopeScaling(
        short_factor=_factors(rope, "short_factor", turns // 2, where),
        long_factor=_factors(rope, "long_factor", turns // 2, where),
        attention_factor=number(rope, "attention_factor", where, null=waves),
        original_max_position_embeddings=original,
    )
    return result


def _kind(rope: dict[str, Any], covered: tuple[str, ...], where: str) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in covered:
        raise UnsupportedModel(
            f"{where}: rope_type {kind!r} is not covered; {', '.join(covered)} are; mend it, or "
            "take another model"
        )
    return str(kind)


def _factors(rope: dict[str, Any], key: str, count: int, where: str) -> tuple[float, ...]:
    found = rope.get(key)
    if not isinstance(found, list) or len(found) != count:
        raise FormatError(f"{where}: {key} must be a list of {count} numbers, found {found!r:.60}")
    return tuple(number({key: value}, key, where) for value in found)


def write_rope(config: LlamaConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling, which transformers 4 and 5 both read."""
    scaling: dict[str, Any] | None = None
    if config.llama3_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(config.llama3_scaling)}
    elif config.yarn_scaling is not None:
        scaling = {"rope_type": "yarn", **vars(config.yarn_scaling)}
    elif config.dynamic_scaling is not None:
        scaling = {"rope_type": "dynamic", "factor": config.dynamic_scaling.factor}
    elif config.rope_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    elif config.longrope_scaling is not None:
        long = config.longrope_scaling
        scaling = {
            "rope_type": "longrope",
            "short_factor": list(long.short_factor),
            "long_factor": list(long.long_factor),
            "attention_factor": long.attention_factor,
        }
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _llama3(rope: dict[str, Any], original: int, where: str) -> Llama3Scaling:
    low, high = (number(rope, f"{end}_freq_factor", where) for end in ("low", "high"))
    if high <= low:
        raise FormatError(f"{where}: high_freq_factor {high} must be above low_freq_factor {low}")
    return Llama3Scaling(number(rope, "factor", where), low, high, original)


def _yarn(
    rope: dict[str, Any], theta: float, trained: int, original: int, where: str
) -> YarnScaling:
    if "factor" not in rope or theta <= 1:
        found = f"found factor {rope.get('factor')!r} and rope_theta {theta}"
        raise FormatError(
            f"{where}: rope_type yarn: {found}; expected a factor, and a rope_theta above 1"
        )
    factor = number(rope, "factor", where, null=trained / original)
    size_of_waves = _mscale(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        one, all_of_it = (number(rope, key, where) for key in ("mscale", "mscale_all_dim"))
        size_of_waves = _mscale(factor, one) / _mscale(factor, all_of_it)
    return YarnScaling(
        factor=factor,
        attention_factor=number(rope, "attention_factor", where, null=size_of_waves),
        beta_fast=number({**rope, "beta_fast": rope.get("beta_fast") or 32}, "beta_fast", where),
        beta_slow=number({**rope, "beta_slow": rope.get("beta_slow") or 1}, "beta_slow", where),
        original_max_position_embeddings=original,
        truncate=flag({"truncate": True, **rope}, "truncate", where),
    )


def _mscale(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by, so that attention stays as sharp as it was."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
