"""Reads what Dynamo's frontend sends a worker; the field names are Dynamo 1.6.1's.

Nothing is dropped silently and nothing converted: a modality, media form or sampling option that is not
served, or a value of another type, is an `InvalidRequestError` that names the field.

An image is `{"Url": "..."}`, as Dynamo sends it, or `{"Bytes": b"..."}`, its file as our own frontend does:
the request plane carries bytes as they are, for half of the time and memory that a data: URL takes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from trtllm_mm_cache.engines.base import GenerationRequest, SamplingParams
from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.pd.reference import Reference
from trtllm_mm_cache.runtime.processor_kwargs import check_processor_kwargs

_Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
_TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_StopText = Annotated[str, Field(max_length=1024)]
_StopIds = Annotated[list[_TokenId], Field(max_length=4096)]

_MAX_SALT_CHARACTERS = 1024

# Options that change the answer and that no engine here implements. A value equal to the one
# named means "off", as clients send it.
_UNSERVED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "guided_decoding": (None,),
}


class _Lenient(BaseModel):
    """Fields we read are typed; fields of newer frontends pass."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _StopConditions(_Lenient):
    max_tokens: Annotated[_Integer, Field(ge=1)] | None = None
    min_tokens: Annotated[_Integer, Field(ge=0)] | None = None
    stop: list[_StopText] | None = Field(None, max_length=64)
    stop_token_ids: _StopIds | None = None
    stop_token_ids_visible: _StopIds | None = None
    stop_token_ids_hidden: _StopIds | None = None
    ignore_eos: StrictBool | None = None


class _SamplingOptions(_Lenient):
    model_config = ConfigDict(frozen=True, extra="allow")

    temperature: Annotated[_Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[_Integer, Field(ge=-1)] | None = None
    seed: _Integer | None = None


class _Request(_Lenient):
    token_ids: list[_TokenId] = Field(min_length=1)
    multi_modal_data: dict[str, list[dict[str, Any]]] | None = None
    mm_processor_kwargs: Any = None
    stop_conditions: _StopConditions = _StopConditions()
    sampling_options: _SamplingOptions = _SamplingOptions()
    eos_token_ids: _StopIds | None = None
    routing: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class PdRequest:
    """One request: what to generate, and the items it is about, in prompt order."""

    generation: GenerationRequest
    references: tuple[Reference, ...]
    processor_kwargs: Mapping[str, Any]


def parse_request(payload: Any, request_id: str, *, max_images: int) -> PdRequest:
    """Read one request; raises `InvalidRequestError` that names the field at fault.

    Its media are taken out of `payload`, which others may keep for as long as the answer takes.
    """
    try:
        request = _Request.model_validate(payload)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])[:80] or "request"
        raise InvalidRequestError(f"{field}: {problem['msg']}") from None
    payload.pop("multi_modal_data", None)
    references = _references(request.multi_modal_data or {}, max_images)
    extra = request.extra_args or {}
    prompt_text = extra.get("formatted_prompt")
    if not isinstance(prompt_text, str | None):
        raise InvalidRequestError("formatted_prompt: must be a string")
    generation = GenerationRequest(
        request_id=request_id,
        token_ids=tuple(request.token_ids),
        prompt_text=prompt_text,
        sampling=_sampling(request),
        cache_salt=_salt(request.routing or {}, extra.get("nvext")),
    )
    return PdRequest(generation, references, _processor_kwargs(request, extra))


def _processor_kwargs(request: _Request, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the image processor is asked for: the first that is given of the frontend's two places."""
    for kwargs in (request.mm_processor_kwargs, extra.get("mm_processor_kwargs")):
        if kwargs is None:
            continue
        try:
            checked = check_processor_kwargs(kwargs)
        except ValueError as error:
            raise InvalidRequestError(f"mm_processor_kwargs: {error}") from None
        if checked:
            return checked
    return {}


def _salt(routing: Mapping[str, Any], nvext: Any) -> str | None:
    """Return the first salt that is given and not empty.

    One of another type must be an error: taken for none, it would let a tenant's images be shared.
    """
    if not isinstance(nvext, dict | None):
        raise InvalidRequestError("nvext: must be an object")
    salts = [routing.get("cache_salt"), (nvext or {}).get("cache_salt")]
    if not all(isinstance(salt, str | None) for salt in salts):
        raise InvalidRequestError("cache_salt: must be a string")
    salt = salts[0] or salts[1]
    if salt is not None and len(salt) > _MAX_SALT_CHARACTERS:
        raise InvalidRequestError(f"cache_salt: must have at most {_MAX_SALT_CHARACTERS} characters")
    return salt


def _references(media: Mapping[str, list[dict[str, Any]]], max_images: int) -> tuple[Reference, ...]:
    for kind, parts in media.items():
        if kind != "image_url" and parts:
            raise InvalidRequestError(f"{kind[:80]}: only images are served")
    parts = media.get("image_url", [])
    if len(parts) > max_images:
        raise InvalidRequestError(
            f"image_url: {len(parts)} images are more than the {max_images} this server takes in one request"
        )
    references = []
    for index, part in enumerate(parts):
        url, content = part.get("Url"), part.get("Bytes")
        if isinstance(url, str):
            references.append(Reference("image", url))
        elif isinstance(content, bytes):
            references.append(Reference("image", content))
        else:
            raise InvalidRequestError(
                "images must arrive as URLs or bytes; switch the frontend's own media decoding off",
                item_index=index,
            )
    return tuple(references)


def _sampling(request: _Request) -> SamplingParams:
    options, stop = request.sampling_options, request.stop_conditions
    for name, off in _UNSERVED.items():
        value = (options.model_extra or {}).get(name)
        if value not in off:
            raise InvalidRequestError(f"{name}: this server does not implement it; leave it out")
    stop_ids = {
        *(stop.stop_token_ids or ()),
        *(stop.stop_token_ids_visible or ()),
        *(stop.stop_token_ids_hidden or ()),
        *(() if stop.ignore_eos else request.eos_token_ids or ()),
    }
    if stop.ignore_eos:
        stop_ids -= set(request.eos_token_ids or ())
    return SamplingParams(
        max_tokens=stop.max_tokens,
        min_tokens=stop.min_tokens or 0,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k if options.top_k and options.top_k > 0 else None,
        seed=options.seed,
        stop=tuple(stop.stop or ()),
        stop_token_ids=tuple(sorted(stop_ids)),
        ignore_eos=bool(stop.ignore_eos),
    )
