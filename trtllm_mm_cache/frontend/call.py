"""What a PD worker is asked for one request, in the form of Dynamo's own frontend."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pybase64
import xxhash

from trtllm_mm_cache.engines.prompt_text import RenderedPrompt
from trtllm_mm_cache.errors import InvalidRequestError, MmCacheError
from trtllm_mm_cache.frontend.request import ChatRequest, GenerationOptions, ImagePart, TextPart
from trtllm_mm_cache.media.data_url import decode_data_url
from trtllm_mm_cache.observability.traces import trace_headers
from trtllm_mm_cache.runtime.generation import MARK, FrontendMark

_MAX_URL_CHARACTERS = 8192


@dataclass(frozen=True)
class Item:
    """One media part: a URL, or the bytes that its data: URL carried. `digest` chooses its PD worker."""

    digest: bytes
    url: str | None = field(default=None, repr=False)
    media: bytes | None = field(default=None, repr=False)

    @property
    def wire(self) -> dict[str, Any]:
        """The form in which a PD worker takes it."""
        return {"Url": self.url} if self.media is None else {"Bytes": self.media}


async def items_of(request: ChatRequest, cut: dict[str, bytes], max_images: int) -> list[Item]:
    """Return the request's media parts in prompt order; what was `cut` for them is taken out of there.

    Raises `InvalidRequestError` for too many, and what is wrong with a data: URL, with the item's position.
    """
    urls = [
        part.image_url.url
        for message in request.messages
        for part in message.content
        if isinstance(part, ImagePart)
    ]
    if len(urls) > max_images:
        raise InvalidRequestError(
            f"messages: {len(urls)} images are more than the {max_images} this server takes in one request"
        )
    salt = (request.salt or "").encode()
    return [await _item(url, cut.pop(url, None), salt, index) for index, url in enumerate(urls)]


async def _item(url: str, cut: bytes | None, salt: bytes, index: int) -> Item:
    if cut is None:
        if not url.startswith("data:") and len(url) > _MAX_URL_CHARACTERS:
            raise InvalidRequestError(
                f"its URL has more than {_MAX_URL_CHARACTERS} characters", item_index=index
            )
        return Item(xxhash.xxh3_64_digest(url.encode(), seed=xxhash.xxh3_64_intdigest(salt)), url=url)

    def decode() -> Item:
        media = _decoded(cut)
        return Item(xxhash.xxh3_64_digest(media, seed=xxhash.xxh3_64_intdigest(salt)), media=media)

    try:
        return await asyncio.to_thread(decode)
    except MmCacheError as error:
        raise error.for_item(index) from None


def _decoded(url: bytes) -> bytes:
    """Decode a data: URL. The body's limit bounds it here; a PD worker has the one for a file."""
    comma = url.find(b",")
    if url[:comma].endswith(b";base64"):
        # As clients write it: without a copy as text, which is for all other forms.
        with contextlib.suppress(ValueError):
            return pybase64.b64decode(memoryview(url)[comma + 1 :], validate=True)
    return decode_data_url(url.decode("ascii"), len(url))


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages for the template: texts, and images without their URLs."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image_url", "image_url": {"url": ""}}
                for part in message.content
            ],
            **({} if message.name is None else {"name": message.name}),
        }
        for message in request.messages
    ]


def payload_of(
    request: GenerationOptions, prompt: RenderedPrompt, eos_token_ids: Sequence[int], adapter: str | None
) -> dict[str, Any]:
    """Return the request to a PD worker for a prompt without items, for the base model or an `adapter`."""
    sampling = {
        name: value
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "seed"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "n"),
        )
        if (value := getattr(request, name)) is not None
    }
    return {
        "model": request.model,
        "token_ids": prompt.token_ids,
        "stop_conditions": {
            "max_tokens": request.max_tokens,
            "min_tokens": request.min_tokens,
            "stop": request.stop,
            "stop_token_ids_visible": request.stop_token_ids,
            "ignore_eos": request.ignore_eos,
        },
        "sampling_options": sampling,
        "output_options": {"prompt_logprobs": request.prompt_logprobs},
        "eos_token_ids": list(eos_token_ids),
        "routing": {"cache_salt": request.salt, "lora_name": adapter},
        "annotations": [],
        "extra_args": {
            "formatted_prompt": prompt.text,
            MARK: FrontendMark(trace_headers=trace_headers()).model_dump(),
        },
    }


def add_chat_options(payload: dict[str, Any], request: ChatRequest, items: Sequence[Item]) -> None:
    """Add to a payload what a chat request alone can ask for."""
    payload["stop_conditions"]["max_tokens"] = request.most_tokens
    if items:
        payload["multi_modal_data"] = {"image_url": [item.wire for item in items]}
    if request.mm_processor_kwargs:
        payload["mm_processor_kwargs"] = dict(request.mm_processor_kwargs)
    if request.logprobs:
        payload["output_options"]["logprobs"] = request.top_logprobs or 0
    if guided := _guided_decoding(request):
        payload["sampling_options"]["guided_decoding"] = guided


def _guided_decoding(request: ChatRequest) -> dict[str, Any] | None:
    asked = {
        name: value
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        if (value := getattr(request, name)) is not None
    }
    response_format = request.response_format or {"type": "text"}
    if response_format != {"type": "text"}:
        asked["response_format"] = response_format
    if len(asked) > 1:
        raise InvalidRequestError(f"{' and '.join(asked)}: give one of them")
    for name, value in asked.items():
        if name != "response_format":
            return {name.removeprefix("guided_"): value}
        return _of_response_format(value)
    return None


def _of_response_format(value: Mapping[str, Any]) -> dict[str, Any]:
    if value.get("type") == "json_object" and len(value) == 1:
        return {"json": {"type": "object"}}
    described = value.get("json_schema")
    if value.get("type") == "json_schema" and isinstance(described, dict):
        schema = described.get("schema")
        if isinstance(schema, dict):
            return {"json": schema}
        raise InvalidRequestError("response_format.json_schema.schema: must be an object")
    raise InvalidRequestError("response_format.type: must be text, json_object or json_schema")
