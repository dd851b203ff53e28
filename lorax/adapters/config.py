"""LoRAConfig: PEFT's names, defaults and meaning; and which modules it picks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorax.adapters.config_keys import NOT_COVERED, PeftKeywords, check_unknown, log, opening_with
from lorax.errors import AdapterError

# What PEFT adapts where target_modules is not given, by model type.
DEFAULT_TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}

NITER = re.compile(r"pissa_niter_(\d{1,3})")  # PiSSA by a randomized SVD

MAX_RANK = 2**16  # above any layer's width; a stranger's config may ask for anything

# How A and B may have started where nothing of it is left once they are trained: PEFT leaves the
# base alone. lorax loads such adapters and starts none.
SETTLED = ("orthogonal", "eva", "mica")
# Of these two PEFT takes the start out of the base, and its file does not hold it.
LOST = ("corda", "lora_ga")


@dataclass(frozen=True)
class LoRAConfig(PeftKeywords):
    """How LoRA is put into a model.

    r: the rank. lora_alpha: the scale's numerator; the path is scaled by lora_alpha / r, or by
        lora_alpha / sqrt(r) with use_rslora.
    target_modules: names ("q_proj" matches every path that ends in it), one regular expression
        that must match whole paths, or "all-linear"; None takes the model's usual ones.
    exclude_modules: names or one regular expression that are left out.
    lora_dropout: the share of the inputs that the path does not see while training.
    fan_in_fan_out: said of GPT-2's Conv1D; lorax sees to it itself and only keeps the word.
    bias: which of the model's own biases are trained: "none", "lora_only" (of the adapted layers)
        or "all".
    lora_bias: B has a bias of its own, scaled as the path is; not on embeddings, not with DoRA.
    init_lora_weights: how A and B start, see initialize.py: True (A kaiming-uniform, B zero),
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
        if self.init_lora_weights is None:  # PEFT draws both then
            object.__setattr__(self, "init_lora_weights", False)
        self._settle_keywords()
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str | list):
                object.__setattr__(self, key, sorted(value))  # PEFT's users pass sets and tuples
        check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        self._check_rank_pattern()
        for name, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{name!r}]", alpha)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise AdapterError(f"lora_dropout is {self.lora_dropout}; expected 0 <= p < 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise AdapterError(f"bias is {self.bias!r}; expected none, all or lora_only")
        _check_names("modules_to_save", self.modules_to_save)
        _check_indices(self.trainable_token_indices)
        self._check_start()
        self._check_loftq()
        how = self.init_lora_weights
        if self.use_dora and (how == "loftq" or self.starts_inside):
            raise AdapterError(f"use_dora with init_lora_weights = {how!r} is not covered by lorax")
        if self.lora_bias and (self.use_dora or not isinstance(how, bool)):
            other = "use_dora" if self.use_dora else f"init_lora_weights = {how!r}"
            raise AdapterError(f"lora_bias and {other}: PEFT does not define the two together")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise AdapterError("layers_to_transform goes with target_modules as a list of names")
        self._compile_patterns()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter") -> LoRAConfig:
        """Build from PEFT's keys, as adapter_config.json holds them.

        Raises:
            AdapterError: a key that PEFT does not have, or one that is not covered and asks for
                something; `where` opens the message.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in NOT_COVERED:
            if values.get(key):
                raise AdapterError(f"{where}: {key} = {values[key]!r} is not covered by lorax")
        check_unknown(values, known, where)
        with opening_with(where):
            return cls(**{key: value for key, value in values.items() if key in known})

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
        if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save or []):
            return False  # trained as a whole
        if not self.target_modules or not _matches(self.target_modules, name):
            return False
        if self.layers_to_transform in (None, []) or name in self.target_modules:
            return True  # no numbers; or a whole path, meant as it stands, whatever its layer
        return self._layer_number(name) in self._layers()

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The entries of target_modules that match none of these paths."""
        names = list(names)
        targets = self.target_modules or []
        targets = [targets] if isinstance(targets, str) else targets
        whole = isinstance(self.target_modules, str)
        return [
            target
            for target in targets
            if not any(_matches(target if whole else [target], name) for name in names)
        ]

    def _check_rank_pattern(self) -> None:
        for name, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{name!r}]", rank)

    def _check_start(self) -> None:
        """Spell init_lora_weights as PEFT understands it; refuse words that it does not have."""
        how = self.init_lora_weights
        lower = how.lower() if isinstance(how, str) else how
        if lower in ("gaussian", "olora", "mica"):  # PEFT takes these in any case
            object.__setattr__(self, "init_lora_weights", lower)
        elif not (isinstance(how, bool) or how in ("loftq", *SETTLED, *LOST) or self.starts_inside):
            raise AdapterError(
                f"init_lora_weights is {how!r}; lorax covers true, false, 'gaussian', 'pissa', "
                f"'pissa_niter_K', 'olora' and 'loftq', and loads {', '.join((*SETTLED, *LOST))}"
            )

    def _check_loftq(self) -> None:
        """Fill in PEFT's defaults, refuse what is not covered."""
        if self.init_lora_weights != "loftq":
            if self.loftq_config:
                log.warning("loftq_config does nothing without init_lora_weights = 'loftq'")
                object.__setattr__(self, "loftq_config", {})
            return
        stated = self.loftq_config
        stated = stated if isinstance(stated, dict) else vars(stated)  # PEFT's LoftQConfig
        config = {"loftq_bits": 4, "loftq_iter": 1, **stated}
        unknown = sorted(set(config) - {"loftq_bits", "loftq_iter", "loftq_format"})
        if unknown:
            raise AdapterError(f"loftq_config: {unknown} unknown; expected loftq_bits, loftq_iter")
        if config["loftq_bits"] != 4:
            raise AdapterError(f"loftq_bits is {config['loftq_bits']!r}; lorax covers 4 (NF4)")
        check_rank("loftq_iter", config["loftq_iter"])
        if config.get("loftq_format", "nf4") not in ("nf4", "nf4-dq"):
            found = config["loftq_format"]
            raise AdapterError(f"loftq_format is {found!r}; expected 'nf4' or 'nf4-dq'")
        object.__setattr__(self, "loftq_config", config)

    def _layers(self) -> list[int]:
        layers = self.layers_to_transform
        return [layers] if isinstance(layers, int) else list(layers or [])

    def _layer_number(self, name: str) -> int | None:
        patterns = self.layers_pattern or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
            if match:
                return int(match.group(match.re.groups))  # the pattern may have groups
        return None

    @staticmethod
    def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return default

    def _compile_patterns(self) -> None:
        """A broken expression is an error here, not somewhere in a search."""
        plain = (self.target_modules, self.exclude_modules)
        layers = self.layers_pattern or []
        used = {expression: expression for expression in plain if isinstance(expression, str)}
        used |= {
            key: rf"(.*\.)?({key})$" for key in (*(self.rank_pattern or ()), *self.alpha_pattern)
        }
        used |= {p: rf".*\.{p}\." for p in ([layers] if isinstance(layers, str) else layers)}
        used |= {m: rf"(^|.*\.){m}($|\..*)" for m in self.modules_to_save or []}
        for expression, whole in used.items():
            try:
                re.compile(expression)
                re.compile(whole)
            except re.error as error:
                raise AdapterError(f"{expression!r} is no regular expression ({error})") from None


def _matches(patterns: list[str] | str, name: str) -> bool:
    """A string is an expression for the whole path; a list holds paths or their ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def check_rank(name: str, rank: Any) -> None:
    """Refuse what is no whole number from 1 to MAX_RANK."""
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"{name} is {rank!r}; expected a whole number from 1 to {MAX_RANK}")


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
