"""A chat request as the client wrote it: every field is served, or refused by its own name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from trtllm_mm_cache.engines.checks import MOST_CHOICES, MOST_LOGPROBS
from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.frontend.refusals import NOT_SERVED, refuse_unserved
from trtllm_mm_cache.runtime.processor_kwargs import check_processor_kwargs

_MAX_MESSAGES: Final = 4096

_Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
_TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Penalty = Annotated[_Number, Field(ge=-2, le=2)]
_Bias = Annotated[_Number, Field(ge=-100, le=100)]
_StopText = Annotated[str, Field(min_length=1, max_length=1024)]

Fields = TypeVar("Fields", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageUrl(_Strict):
    """Where an image is. `detail` "low" would be another image: it is refused."""

    url: str
    detail: Literal["auto", "high"] | None = None


class TextPart(_Strict):
    """Text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    """One message. What an earlier answer held besides its text must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]
    name: Annotated[str, Field(max_length=256)] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_one_part(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: StrictBool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class Nvext(_Strict):
    """The one of Dynamo's extensions that is served."""

    cache_salt: Annotated[str, Field(max_length=1024)] | None = None


class GenerationOptions(_Strict):
    """What chat and plain completions may both ask for."""

    model: str
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: _Count | None = None
    min_tokens: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[_Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=1024)] | None = None
    stop: Annotated[list[_StopText], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=4096)] | None = None
    ignore_eos: StrictBool = False
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)] | None = None
    skip_special_tokens: StrictBool = True
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    nvext: Nvext | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _names_are_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(name.isascii() and name.isdecimal() and int(name) < 2**32 for name in value):
            raise ValueError("its names must be token ids")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationOptions:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: only with stream set to true")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError(
                "prompt_logprobs: not with stream set to true, for no chunk has a place for them"
            )
        return self

    @property
    def salt(self) -> str | None:
        """The first salt that is given and not empty."""
        return self.cache_salt or (self.nvext and self.nvext.cache_salt) or None


class ChatRequest(GenerationOptions):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: _Count | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    mm_processor_kwargs: dict[str, Any] | None = None

    @field_validator("guided_json", mode="before")
    @classmethod
    def _a_schema(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            raise ValueError("it should be a JSON schema, as an object or as text")  # noqa: TRY004
        return value

    @field_validator("mm_processor_kwargs")
    @classmethod
    def _bounded(cls, value: dict[str, Any] | None) -> Mapping[str, Any] | None:
        return None if value is None else check_processor_kwargs(value)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs: only with logprobs set to true")
        if len({self.max_tokens, self.max_completion_tokens, None}) == 3:
            raise InvalidRequestError("max_tokens and max_completion_tokens: give one of them")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError("continue_final_message: only with add_generation_prompt set to false")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The answer's bound, under the name that was used."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationOptions):
    """A request to /v1/completions; without a bound its answer has the 16 tokens that OpenAI's has."""

    prompt: str | Annotated[list[_TokenId], Field(min_length=1)]
    max_tokens: _Count | None = 16

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            value = value[0]  # a list of one prompt
        if isinstance(value, str) or (
            isinstance(value, list)
            and value
            and all(type(each) is int and 0 <= each < 2**32 for each in value)
        ):
            return value
        raise ValueError("it should be one text, or one list of token ids")


_REASONS: Final = {
    "extra_forbidden": NOT_SERVED,
    "missing": "it is required",
    "dict_type": "it should be an object",
    "model_type": "it should be an object",
    "model_attributes_type": "it should be an object",
    "union_tag_not_found": "it should be text or image_url",
    "union_tag_invalid": "it should be text or image_url",
}
_SUBJECT: Final = re.compile(r"^(Input|String|List|Dictionary) should")


def read_request(kind: type[Fields], fields: dict[str, Any]) -> Fields:
    """Return the request; null is no field. Raises `InvalidRequestError` naming the first fault."""
    fields = _without_nulls(fields)
    refuse_unserved(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        name = _name_of(problem["loc"])
        reason = _REASONS.get(problem["type"]) or _SUBJECT.sub(
            "it should", problem["msg"].removeprefix("Value error, ")
        )
        if problem["type"].startswith("union_tag"):
            name += ".type"
        raise InvalidRequestError(f"{name}: {reason}") from None


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _name_of(location: tuple[int | str, ...]) -> str:
    """Return where a problem is, as a client would write it: messages[0].content[1].image_url.url."""
    name, before = "", ("", "")
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif before[0] != "content":  # after a part's index pydantic puts which kind of part it is
            name += f".{part}" if name else part
        before = (before[1], str(part))
    return name[:120] or "request"
