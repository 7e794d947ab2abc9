"""Reads what Dynamo's frontend sends a worker; the field names are Dynamo 1.6.1's.

Nothing is dropped silently and nothing converted: a modality, media form or sampling option that is not
served, or a value of another type, is an `InvalidRequestError` that names the field.

An image is `{"Url": "..."}`, as Dynamo sends it, or `{"Bytes": b"..."}`, its file as our own frontend does:
the request plane carries bytes as they are, for half of the time and memory that a data: URL takes here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from trtllm_mm_cache.engines.base import GenerationRequest
from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.pd.reference import Reference
from trtllm_mm_cache.pd.sampling import (
    LENIENT,
    OutputOptions,
    SamplingOptions,
    StopConditions,
    TokenId,
    TokenIds,
    read_sampling,
)
from trtllm_mm_cache.runtime.processor_kwargs import check_processor_kwargs

_MAX_SALT_CHARACTERS = 1024


class _Request(BaseModel):
    model_config = LENIENT

    token_ids: list[TokenId] = Field(min_length=1)
    multi_modal_data: dict[str, list[dict[str, Any]]] | None = None
    mm_processor_kwargs: Any = None
    stop_conditions: StopConditions = StopConditions()
    sampling_options: SamplingOptions = SamplingOptions()
    output_options: OutputOptions = OutputOptions()
    eos_token_ids: TokenIds | None = None
    routing: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class PdRequest:
    """One request: what to generate, and the items it is about, in prompt order."""

    generation: GenerationRequest
    references: tuple[Reference, ...]
    processor_kwargs: Mapping[str, Any]


def parse_request(
    payload: Any, request_id: str, *, max_images: int, adapters: Collection[str] = ()
) -> PdRequest:
    """Read one request, which may name one of `adapters`.

    Raises `InvalidRequestError` that names the field at fault.
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
        sampling=read_sampling(
            request.sampling_options,
            request.stop_conditions,
            request.output_options,
            request.eos_token_ids or (),
        ),
        cache_salt=_salt(request.routing or {}, extra.get("nvext")),
        lora_name=_adapter((request.routing or {}).get("lora_name"), adapters),
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


def _adapter(name: Any, adapters: Collection[str]) -> str | None:
    if name is None:
        return None
    if not adapters:
        raise InvalidRequestError("lora_name: adapters are not served")
    if not isinstance(name, str) or name not in adapters:
        raise InvalidRequestError("lora_name: this worker has no adapter of this name")
    return name


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
        source = part.get("Url", part.get("Bytes"))
        if not isinstance(source, str | bytes):
            raise InvalidRequestError(
                "images must arrive as URLs or bytes; switch the frontend's own media decoding off",
                item_index=index,
            )
        references.append(Reference("image", source))
    return tuple(references)
