"""The ways to ask for text, /v1/chat/completions and /v1/completions: from a body to a PD worker's call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from trtllm_mm_cache.frontend.answer import Answer, ChatForm, Form, TextForm
from trtllm_mm_cache.frontend.body import Body
from trtllm_mm_cache.frontend.call import add_chat_options, items_of, messages_of, payload_of
from trtllm_mm_cache.frontend.models import Models
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.request import ChatRequest, CompletionRequest, GenerationOptions, read_request
from trtllm_mm_cache.settings import FrontendSettings

_TAIL_TOKENS: Final = 8
"""Of the prompt: what the answer's first token may be decoded in the light of."""


@dataclass(frozen=True)
class Call:
    """A request that is ready for a PD worker; `items` are digests of its media references.

    What it holds besides the payload is small, for it is held as long as the answer takes. `stop` are the
    strings that end the answer; `prompt_tail` are the prompt's last tokens.
    """

    payload: dict[str, Any] = field(repr=False)
    model: str
    prompt_tail: Sequence[int]
    stop: Sequence[str]
    skip_special_tokens: bool
    stream: bool
    stream_usage: bool
    items: Sequence[bytes] = ()
    logprobs: bool = False
    choices: int = 1
    prompt_logprobs: bool = False

    @classmethod
    def of(
        cls,
        payload: dict[str, Any],
        request: GenerationOptions,
        items: Sequence[bytes] = (),
        *,
        logprobs: bool = False,
    ) -> Call:
        """Return the call that asks `payload` for `request`."""
        return cls(
            payload,
            request.model,
            payload["token_ids"][-_TAIL_TOKENS:],
            request.stop or (),
            request.skip_special_tokens,
            request.stream,
            bool(request.stream_options and request.stream_options.include_usage),
            items,
            logprobs,
            request.n or 1,
            request.prompt_logprobs is not None,
        )


class Api(Protocol):
    """What one endpoint of the OpenAI API takes and answers."""

    async def read(self, body: Body) -> Call:
        """Turn a body, which may be emptied, into a call. Raises `RequestError` that names the field."""
        ...

    def form(self, answer: Answer) -> Form:
        """Return the form of the endpoint's answers."""
        ...


class ChatApi:
    """/v1/chat/completions."""

    def __init__(self, prompts: Prompts, models: Models, settings: FrontendSettings) -> None:
        self._prompts = prompts
        self._models = models
        self._settings = settings

    async def read(self, body: Body) -> Call:
        """See `Api.read`."""
        request = read_request(ChatRequest, body.fields)
        adapter = await self._models.adapter(request.model)
        messages = messages_of(request)
        items = await items_of(request, body.cut, self._settings.max_images_per_request)
        prompt = await self._prompts.chat(
            messages,
            chat_template_kwargs=request.chat_template_kwargs,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        payload = payload_of(request, prompt, self._prompts.eos_token_ids, adapter)
        add_chat_options(payload, request, items)
        return Call.of(payload, request, [item.digest for item in items], logprobs=request.logprobs)

    def form(self, answer: Answer) -> Form:
        """See `Api.form`."""
        return ChatForm(answer)


class TextApi:
    """/v1/completions: a text, or token ids, to be continued as they are."""

    def __init__(self, prompts: Prompts, models: Models) -> None:
        self._prompts = prompts
        self._models = models

    async def read(self, body: Body) -> Call:
        """See `Api.read`."""
        request = read_request(CompletionRequest, body.fields)
        adapter = await self._models.adapter(request.model)
        if isinstance(request.prompt, str):
            prompt = await self._prompts.plain(request.prompt)
        else:
            prompt = await self._prompts.tokens(request.prompt)
        payload = payload_of(request, prompt, self._prompts.eos_token_ids, adapter)
        return Call.of(payload, request)

    def form(self, answer: Answer) -> Form:
        """See `Api.form`."""
        return TextForm(answer)
