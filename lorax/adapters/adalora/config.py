"""AdaLoRAConfig: PEFT's names, defaults and meaning. No torch: recipes are checked without it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from lorax.adapters.config import LoRAConfig
from lorax.adapters.config_checks import check_rank, settle_keywords
from lorax.adapters.variants import UNKNOWN_STEPS, Variant, register_variant
from lorax.errors import AdapterError

# Options of LoRA that PEFT's AdaLoRA refuses or passes over without a word, and their defaults.
_NOT_FOR_ADALORA: dict[str, Any] = {
    "alpha_pattern": {},
    "loftq_config": {},
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
}


@dataclass(frozen=True)
class AdaLoRAConfig(LoRAConfig):
    """How AdaLoRA is put into a model; which modules, dropout and so on as in `LoRAConfig`.

    target_r: the average rank that is left in the end.
    init_r: the rank of every layer at first. Every layer's path is scaled by
        lora_alpha / (init_r + 1e-5), whatever rank is left of it. `r` is not used.
    total_step: the optimizer steps of the whole run.
    tinit: after so many steps the ranks begin to fall.
    tfinal: for so many steps in the end the ranks stay, and what is left trains on.
    deltaT: between the two the ranks are dealt out anew every so many steps.
    beta1, beta2: how slowly the averages of sensitivity and of its uncertainty move.
    orth_reg_weight: the weight of the penalty that keeps A's rows and B's columns orthonormal.
    init_lora_weights: True (A and B ~ N(0, 0.02), E zero), or False (all three ~ N(0, 1)).
    rank_pattern: {"<path>.lora_E": a boolean for each of init_r ranks: is it left}; None while the
        ranks are not settled.

    Raises:
        AdapterError: a value that is impossible or not covered, or steps that leave no time for the
            ranks to fall.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    peft_type: str = field(default="ADALORA", kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        settle_keywords(self)
        for key, rest in _NOT_FOR_ADALORA.items():
            if getattr(self, key) != rest:
                raise AdapterError(
                    f"{key} = {getattr(self, key)!r} does not go with AdaLoRA; leave it out"
                )
        check_rank("init_r", self.init_r)
        check_rank("target_r", self.target_r)
        super().__post_init__()
        if self.lora_alpha <= 0:
            raise AdapterError(f"lora_alpha is {self.lora_alpha}; expected above 0 with AdaLoRA")
        if self.init_lora_weights not in (True, False):
            raise AdapterError(
                f"init_lora_weights is {self.init_lora_weights!r}; expected true or false with "
                "AdaLoRA"
            )
        self._check_averages()
        self._check_steps()

    @property
    def last_allocation(self) -> int:
        """The step (from 1) after which the ranks are settled."""
        assert self.total_step is not None
        return self.total_step - self.tfinal

    def rank(self, module_name: str) -> int:
        """The rank of the layer of that path: init_r, or what the pattern has left of it."""
        mask = (self.rank_pattern or {}).get(f"{module_name}.lora_E")
        return self.init_r if mask is None else sum(mask)

    def scaling(self, module_name: str) -> float:
        """lora_alpha / (init_r + 1e-5), for every layer."""
        return self.lora_alpha / (self.init_r + 1e-5)

    def unmatched_patterns(self, targets: Collection[str]) -> list[str]:
        """A line for each key of rank_pattern that belongs to none of these paths."""
        strangers = set(self.rank_pattern or ()) - {f"{name}.lora_E" for name in targets}
        return [
            f"rank_pattern: {name!r} belongs to no adapted module" for name in sorted(strangers)
        ]

    def budget(self, step: int, layers: int) -> int:
        """How many ranks all layers may keep together after `step` (from 1): a cubic fall."""
        first, last = self.init_r * layers, self.target_r * layers
        if step <= self.tinit:
            return first
        if step > self.last_allocation:
            return last
        left = 1 - (step - self.tinit) / (self.last_allocation - self.tinit)
        return int((first - last) * left**3 + last)

    def check_that_ranks_fall(self) -> None:
        """What a training run asks beyond a valid config.

        Raises:
            AdapterError: the ranks would never change, or be dealt out before a step was watched.
        """
        if self.target_r >= self.init_r:
            raise AdapterError(
                f"target_r {self.target_r} is not below init_r {self.init_r}: "
                "the ranks would never change; give a smaller target_r"
            )
        if self.last_allocation < 2:
            raise AdapterError(
                f"with tfinal {self.tfinal} the ranks of a run of {self.total_step} steps settle "
                "before one was watched; train longer"
            )

    def check_rank_pattern(self) -> None:
        """Refuse what is no mask."""
        for name, mask in (self.rank_pattern or {}).items():
            booleans = isinstance(mask, list) and all(isinstance(keep, bool) for keep in mask)
            if not booleans or len(mask) != self.init_r or not name.endswith(".lora_E"):
                raise AdapterError(
                    f"rank_pattern[{name!r}]: expected a path that ends in .lora_E and a list of "
                    f"init_r = {self.init_r} booleans"
                )

    def _check_averages(self) -> None:
        for key in ("beta1", "beta2"):
            if not 0 < getattr(self, key) < 1:
                raise AdapterError(f"{key} is {getattr(self, key)!r}; expected 0 < {key} < 1")
        if not 0 <= self.orth_reg_weight < float("inf"):
            raise AdapterError(f"orth_reg_weight is {self.orth_reg_weight!r}; expected 0 or more")

    def _check_steps(self) -> None:
        if self.total_step is None or self.total_step < 1:
            raise AdapterError(
                f"total_step is {self.total_step!r}; AdaLoRA needs the run's optimizer steps"
                "; give their number, 1 or more"
            )
        if self.tinit < 0 or self.tfinal < 0 or self.deltaT < 1:
            raise AdapterError(
                f"tinit, tfinal and deltaT are {self.tinit}, {self.tfinal} and {self.deltaT}; "
                "expected at least 0, 0 and 1"
            )
        if self.tinit >= self.last_allocation:
            raise AdapterError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave none of {self.total_step} "
                "steps for the ranks to fall in; lower them or train longer"
            )


def _summary(config: AdaLoRAConfig) -> str:
    known = config.total_step != UNKNOWN_STEPS
    last = config.last_allocation if known else f"the last but {config.tfinal}"
    return (
        f"AdaLoRA: from rank {config.init_r} to {config.target_r} on average, "
        f"in steps {config.tinit + 1} to {last}"
    )


def _from_recipe(values: dict[str, Any], steps: int) -> AdaLoRAConfig:
    config = AdaLoRAConfig(**values, total_step=steps)
    config.check_that_ranks_fall()
    return config


def _refuses(recipe: Any) -> str | None:
    """The ranks settle by the step's number, up to the last one."""
    refused = {"early_stopping_patience": recipe.train.early_stopping_patience > 0}
    refused["nan_policy"] = recipe.train.nan_policy == "rollback"
    for key in (key for key, is_set in refused.items() if is_set):
        return (
            f"train.{key} = {getattr(recipe.train, key)!r}: AdaLoRA's ranks settle with the step's "
            "number, which that would leave behind; leave it out"
        )
    return None


register_variant(
    Variant(
        "adalora",
        AdaLoRAConfig,
        title="AdaLoRA",
        in_peft=True,
        summary=_summary,
        layer="lorax.adapters.adalora.layer:AdaLoRALinear",
        unused=frozenset(_NOT_FOR_ADALORA),
        not_in_recipes=frozenset({"r", "total_step", "rank_pattern"}),
        from_recipe=_from_recipe,
        refuses=_refuses,
        hook="lorax.training.methods:AdaLoRAHook",
        no_matrix="is ADALORA; expected LORA, which fold_into_lora(model) makes of it",
    )
)
