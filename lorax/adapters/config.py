"""LoRAConfig: PEFT's names, defaults and meaning; and which modules it picks."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lorax.adapters.config_keys import PeftKeywords
from lorax.adapters.matching import matches_end, matches_module, matches_whole, number_behind

NITER = re.compile(r"pissa_niter_(\d{1,3})")  # PiSSA by a randomized SVD

# How A and B may have started where nothing of it is left once they are trained: PEFT leaves the
# base alone. lorax loads such adapters and starts none.
SETTLED = ("orthogonal", "eva", "mica")
# Of these two PEFT takes the start out of the base, and its file does not hold it.
LOST = ("corda", "lora_ga")


@dataclass(frozen=True)
class LoRAConfig(PeftKeywords):
    """How LoRA is put into a model.

    r: the rank.
    lora_alpha: the update is scaled by lora_alpha / r.
    use_rslora: the update is scaled by lora_alpha / sqrt(r) instead (arXiv:2312.03732).
    target_modules: names ("q_proj" matches every path that ends in it), one regular expression
        that must match whole paths, or "all-linear"; None takes the model's usual ones.
    exclude_modules: names or one regular expression that are left out.
    lora_dropout: the share of the inputs that the path does not see while training.
    fan_in_fan_out: PEFT's flag for Conv1D; kept for files, unused: weights are always (out, in).
    bias: which of the model's own biases are trained: "none", "lora_only" (of the adapted layers)
        or "all".
    lora_bias: B has a bias of its own, scaled as the path is; not on embeddings, not with DoRA.
    init_lora_weights: how A and B start (lora.py, pissa.py): True (A kaiming-uniform, B zero),
        "gaussian" (A ~ N(0, 1/r)), False (both random: the adapter changes the model from the
        start), "pissa", "pissa_niter_K", "olora" or "loftq". "orthogonal", "eva", "mica", "corda"
        and "lora_ga" are words of loaded adapters.
    layers_to_transform: only these layers, by number; with target_modules as names only.
    layers_pattern: the word before the number, where the paths have several.
    rank_pattern, alpha_pattern: {path's end or expression: value} for single layers.
    use_dora: magnitude and direction trained apart (Liu et al., arXiv:2402.09353).
    modules_to_save: names of modules that are trained as a whole, in a copy.
    trainable_token_indices: rows of the embedding that are trained, for the embedding or by name.
    ensure_weight_tying: a tied head and embedding that are trained as a whole stay one.
    loftq_config: {"loftq_bits": 4, "loftq_iter": N}, with init_lora_weights = "loftq"; lorax's
        own key "loftq_format" takes "nf4" (PEFT's, the default) or "nf4-dq".

    PEFT's other keywords are in config_keys.py: kept, or refused unless at rest. None, and an empty
    list or dictionary, are the default, as in PEFT.

    Raises:
        AdapterError: a value that is impossible or not covered.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    loftq_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from lorax.adapters.config_checks import check_config

        check_config(self)

    def check_rank_pattern(self) -> None:
        """Refuse a rank that is none; AdaLoRA's rank_pattern holds masks."""
        from lorax.adapters.config_checks import check_ranks

        check_ranks(self.rank_pattern)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter") -> Self:
        """Build from PEFT's keys, as adapter_config.json holds them.

        Raises:
            AdapterError: a key that PEFT does not have, or one that is not covered and asks for
                something; `where` opens the message.
        """
        from lorax.adapters.config_files import known_values, opening_with

        known = known_values(cls, values, where)
        with opening_with(where):
            return cls(**known)

    @property
    def starts_inside(self) -> bool:
        """Whether A and B start as components of the weight, which the base beside them lacks."""
        how = self.init_lora_weights
        return isinstance(how, str) and (how in ("pissa", "olora") or self.starts_at_random)

    @property
    def starts_at_random(self) -> bool:
        """Whether those components are drawn, so that base and config do not determine them."""
        how = self.init_lora_weights
        return isinstance(how, str) and NITER.fullmatch(how) is not None

    def rank(self, module_name: str) -> int:
        """The rank of the layer of that path."""
        return self._pattern_value(self.rank_pattern, module_name, self.r)

    def scaling(self, module_name: str) -> float:
        """What the low-rank path of that layer is multiplied by."""
        alpha = self._pattern_value(self.alpha_pattern, module_name, self.lora_alpha)
        rank = self.rank(module_name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def selects(self, name: str) -> bool:
        """Whether this path is a target, by PEFT's rules (for a given target_modules)."""
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        if any(matches_module(part, name) for part in self.modules_to_save or []):
            return False  # trained as a whole
        if not self.target_modules or not _matches(self.target_modules, name):
            return False
        if self.layers_to_transform in (None, []) or name in self.target_modules:
            return True  # no numbers; or a whole path, meant as it stands, whatever its layer
        return self._layer_number(name) in self._layers()

    def unmatched(self, names: Collection[str]) -> list[str]:
        """The entries of target_modules that match none of these paths."""
        targets = self.target_modules or []
        entries = {targets: targets} if isinstance(targets, str) else {t: [t] for t in targets}
        return [t for t, entry in entries.items() if not any(_matches(entry, n) for n in names)]

    def unmatched_patterns(self, targets: Collection[str]) -> list[str]:
        """A line for each key of rank_pattern and alpha_pattern that matches none of the paths."""
        lines = []
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, key).items():
                if not any(self._pattern_value({pattern: True}, name, False) for name in targets):
                    found = f"{pattern!r} (for {value}) matches no adapted module"
                    lines.append(f"{key}: {found}; mend it, or leave it out")
        return lines

    def check_start(self) -> None:
        """Refuse, as an AdapterError, a start that only a loaded adapter can have had."""
        from lorax.adapters.config_checks import check_start

        check_start(self)

    def _layers(self) -> list[int]:
        layers = self.layers_to_transform
        return [layers] if isinstance(layers, int) else list(layers or [])

    def _layer_number(self, name: str) -> int | None:
        patterns = self.layers_pattern or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            number = number_behind(pattern, name)
            if number is not None:
                return number
        return None

    @staticmethod
    def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        for key, value in patterns.items():
            if matches_end(key, name):
                return value
        return default


def _matches(patterns: list[str] | str, name: str) -> bool:
    """A string is an expression for the whole path; a list holds paths or their ends."""
    if isinstance(patterns, str):
        return matches_whole(patterns, name)
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)
