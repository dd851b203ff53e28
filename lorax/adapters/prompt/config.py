"""PromptTuningConfig: PEFT's names, defaults and meaning. No torch, as in adalora/config.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lorax.adapters.config_files import check_unknown, opening_with
from lorax.adapters.config_keys import AdapterConfig
from lorax.adapters.variants import Variant, register_variant
from lorax.errors import AdapterError

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
MAX_VIRTUAL_TOKENS = 2**20  # beyond any model's positions; a stranger's config may ask for anything


@dataclass(frozen=True)
class PromptTuningConfig(AdapterConfig):
    """How many virtual tokens stand in front of the text, and how they start.

    num_virtual_tokens: how many virtual tokens.
    prompt_tuning_init: "RANDOM" (N(0, 1)), "SAMPLE_VOCAB" (embeddings of tokens drawn at random),
        or "TEXT" (those of prompt_tuning_init_text, repeated or cut to fit).
    prompt_tuning_init_text: the text of "TEXT".
    tokenizer_name_or_path: whose words these are, for PEFT; lorax writes the base model's path
        where it is not given. `add_adapter` takes the tokenizer itself.
    tokenizer_kwargs: what PEFT gives its tokenizer; lorax only keeps it.
    token_dim, num_layers, num_attention_heads: the model's; written down, and found out by lorax.
    num_transformer_submodules: 1; encoder-decoders, which have 2, are not covered.

    Raises:
        AdapterError: a value that is impossible or not covered.
    """

    num_virtual_tokens: int
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def declared(self) -> tuple[int, str] | None:
        """See the base class: the virtual tokens' values."""
        values = self.num_virtual_tokens * (self.token_dim or 0)
        return values, f"num_virtual_tokens = {self.num_virtual_tokens}"

    def __post_init__(self) -> None:
        n = self.num_virtual_tokens
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_VIRTUAL_TOKENS:
            raise AdapterError(
                f"num_virtual_tokens is {n!r}; expected a whole number from 1 to "
                f"{MAX_VIRTUAL_TOKENS}"
            )
        if self.prompt_tuning_init not in INITS:
            raise AdapterError(
                f"prompt_tuning_init is {self.prompt_tuning_init!r}; expected one of {INITS}"
            )
        has_text = bool(self.prompt_tuning_init_text)
        if self.prompt_tuning_init == "TEXT" and not has_text:
            raise AdapterError(
                "prompt_tuning_init = 'TEXT' needs a prompt_tuning_init_text"
                "; give one, or start from 'RANDOM'"
            )
        if self.tokenizer_kwargs and self.prompt_tuning_init != "TEXT":
            raise AdapterError(
                "tokenizer_kwargs go with prompt_tuning_init = 'TEXT' only; leave them out"
            )
        if self.num_transformer_submodules not in (None, 1):
            raise AdapterError(
                f"num_transformer_submodules is {self.num_transformer_submodules!r}; lorax covers "
                "decoders, which have 1; leave it out"
            )

    def for_file(self, base: str | None) -> Self:
        """PEFT does not read the file of a prompt that starts as a text without a tokenizer."""
        if self.prompt_tuning_init != "TEXT":
            return self
        name = self.tokenizer_name_or_path or base or "unknown"
        return dataclasses.replace(self, tokenizer_name_or_path=name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter") -> Self:
        """Build from PEFT's keys, as adapter_config.json holds them.

        Raises:
            AdapterError: a key that PEFT does not have or lorax does not cover, with a value;
                `where` opens the message.
        """
        types = {
            "num_virtual_tokens": int,
            "prompt_tuning_init": str,
            "tokenizer_kwargs": dict | None,
        }
        known = [field.name for field in dataclasses.fields(cls)]
        text = ("prompt_tuning_init_text", "tokenizer_name_or_path")
        check_unknown(values, known, where)
        for key, value in values.items():
            if key not in known:
                continue
            kind: Any = types.get(key, str | None if key in text else int | None)
            if not isinstance(value, kind):
                raise AdapterError(
                    f"{where}: {key} = {value!r} has the wrong type"
                    f"; expected {getattr(kind, '__name__', kind)}"
                )
        if "num_virtual_tokens" not in values:
            raise AdapterError(
                f"{where}: num_virtual_tokens is missing"
                "; expected a whole number, that of the prompt's rows; add it"
            )
        with opening_with(where):
            return cls(**{key: value for key, value in values.items() if key in known})


register_variant(
    Variant(
        "prompt-tuning",
        PromptTuningConfig,
        title="Prompt tuning",
        in_peft=True,
        summary=lambda config: f"{config.num_virtual_tokens} virtual tokens in front of each row",
        not_in_recipes=frozenset(
            {
                "tokenizer_name_or_path",
                "tokenizer_kwargs",
                "token_dim",
                "num_layers",
                "num_attention_heads",
                "num_transformer_submodules",
            }
        ),
        has_b=False,
        add="lorax.adapters.prompt.layer:add_prompt",
        insert="lorax.adapters.prompt.layer:insert_prompt",
        no_merge="a prompt changes no weight, so there is nothing to merge; keep it as an adapter",
        no_verify="a tuned prompt; verify covers adapters that have weights",
        no_matrix="is PROMPT_TUNING; expected a LoRA",
    )
)
