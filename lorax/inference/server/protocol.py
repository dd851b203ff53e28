"""Requests as OpenAI has them, checked.

    a field of the classes below    is kept
    IGNORED                         says nothing about the answer: whatever it says is fine
    NEUTRAL                         not supported, but for the value that asks for nothing
    anything else                   an unknown field: refused, as OpenAI does

So nothing that would change the answer is passed over in silence.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorax.errors import LoraxError

IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "min_p": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity"), ()),
    "web_search_options": (),
}
_INT64 = 2**63
Token = Annotated[int, Field(ge=0, lt=_INT64)]


class Refused(LoraxError):
    """What a client is told in OpenAI's error form.

    status: of HTTP. param: the field that is to blame. code: OpenAI's word for it.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Text(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """include_usage: a last chunk with the tokens' counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(_Strict):
    """What chat and completion have in common."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    ignore_eos: bool = False  # vLLM's: an end token is one like any other

    @property
    def stops(self) -> list[str]:
        """The stop words as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Chat(Asked):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @property
    def most(self) -> int | None:
        """How many tokens at most; None: as many as there may be."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are wanted; None: no log probabilities."""
        return self.top_logprobs if self.logprobs else None


class Completion(Asked):
    """Of /v1/completions: one prompt or several, as text or tokens."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        given: Any = self.prompt
        return [given] if given and isinstance(given[0], int) else given

    @property
    def most(self) -> int | None:
        """How many tokens at most."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are wanted; None: no log probabilities."""
        return self.logprobs


class LoadAdapter(_Strict):
    """vLLM's. load_inplace: in the place of one with that name."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


class UnloadAdapter(_Strict):
    """vLLM's."""

    lora_name: str
    lora_int_id: int | None = None


Request = TypeVar("Request", bound=_Strict)


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body, which must be an object."""
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refused(f"the body is a JSON {type(values).__name__}; expected an object")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def read_request(kind: type[Request], body: bytes) -> Request:
    """The request in a body.

    Raises:
        Refused: it is none, or one that cannot be met.
    """
    values = {k: v for k, v in read_json(body).items() if v is not None}
    if issubclass(kind, Asked):
        values = {k: v for k, v in values.items() if k not in IGNORED and not _asks_nothing(k, v)}
    try:
        found = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    if isinstance(found, Chat | Completion):
        _check_together(found)
    return found


def _asks_nothing(field: str, value: Any) -> bool:
    """Whether it is a field that may be there with this value, and means nothing then."""
    if field not in NEUTRAL:
        return False
    if value not in NEUTRAL[field]:
        raise Refused(
            f"{field} is not supported by this server; leave it out",
            param=field,
            code="unsupported_parameter",
        )
    return True


def _check_together(asked: Chat | Completion) -> None:
    stops = asked.stops
    if len(stops) > 4 or not all(stops):
        raise Refused("stop: expected up to 4 texts that are not empty", param="stop")
    if isinstance(asked, Chat) and asked.top_logprobs and not asked.logprobs:
        raise Refused("top_logprobs: expected logprobs to be true with it", param="top_logprobs")
    if isinstance(asked, Completion) and not asked.prompts:
        raise Refused("prompt: expected at least one", param="prompt")


def _refusal(error: ValidationError) -> Refused:
    """The first thing that is wrong, in OpenAI's words where it has some."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return Refused(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return Refused(
            f"Missing required parameter: '{param}'.",
            param=param,
            code="missing_required_parameter",
        )
    return Refused(f"Invalid '{param}': {first['msg']}", param=param, code="invalid_value")
