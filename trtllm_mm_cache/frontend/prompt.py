"""A request's prompt: text bounded before it is tokenised, then the model's own template and tokenizer."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from trtllm_mm_cache.engines.model_limits import context_and_ends
from trtllm_mm_cache.engines.prompt_text import PromptRenderer, RenderedPrompt
from trtllm_mm_cache.errors import InvalidRequestError, OverloadedError
from trtllm_mm_cache.frontend.text import AnswerText
from trtllm_mm_cache.runtime.admission import Admission
from trtllm_mm_cache.settings import MB

_CHARACTERS_A_TOKEN: Final = 16
"""Three to four times what prose has: runs of spaces or rules make few tokens of many characters."""

_INLINE_CHARACTERS: Final = 2048
"""Up to this length a prompt is rendered on the event loop: quicker than a thread's round trip."""

_MAX_TEXT_AT_ONCE: Final = 16 * MB
"""Characters being tokenised at a time: each takes some 160 bytes of memory while it is."""


class Prompts:
    """Renders and tokenises for one model. For use from one event loop.

    A text that could not fit into the model's context is refused before it is tokenised.
    """

    def __init__(self, renderer: PromptRenderer, context: int, eos_token_ids: Sequence[int]) -> None:
        """`context` is the model's, in tokens."""
        self.eos_token_ids = eos_token_ids
        self._renderer = renderer
        self._context = context
        self._max_characters = context * _CHARACTERS_A_TOKEN
        self.admission = Admission(
            max_items=sys.maxsize,
            max_bytes=_MAX_TEXT_AT_ONCE,
            refusal=lambda: OverloadedError("too much text is being tokenised; retry in a moment"),
            what="text",
        )

    @classmethod
    def from_model(cls, model_path: Path) -> Prompts:
        """Read the model's tokenizer, template and configuration. Blocking. Raises `ConfigurationError`."""
        return cls(PromptRenderer.from_model(model_path), *context_and_ends(model_path))

    @property
    def backend(self) -> Any:
        """The tokenizer, as one of the tokenizers library."""
        return self._renderer.backend

    def answer_text(
        self, prompt_tail: Sequence[int], stop: Sequence[str], *, skip_special_tokens: bool
    ) -> AnswerText:
        """Return what turns an answer's tokens into text."""
        return AnswerText(self.backend, prompt_tail, stop, skip_special_tokens=skip_special_tokens)

    async def chat(self, messages: list[dict[str, Any]], **options: Any) -> RenderedPrompt:
        """Return the prompt of a conversation; `options` are those of `PromptRenderer.render`."""
        texts = [part.get("text", "") for message in messages for part in message["content"]]
        characters = sum(map(len, texts)) + len(json.dumps(options.get("chat_template_kwargs") or {}))
        return await self._bounded(characters, lambda: self._renderer.render(messages, **options))

    async def plain(self, text: str) -> RenderedPrompt:
        """Return the prompt of a text that is complete already."""
        return await self._bounded(len(text), lambda: self._renderer.tokenize(text))

    async def tokens(self, token_ids: list[int]) -> RenderedPrompt:
        """Return the prompt of tokens that are complete already."""
        backend = self.backend
        if max(token_ids) >= backend.get_vocab_size():
            raise InvalidRequestError("prompt: it has a token id that the model does not know")
        text = backend.decode(token_ids, skip_special_tokens=False)
        return await self._bounded(len(token_ids), lambda: RenderedPrompt(text, token_ids))

    async def _bounded(self, characters: int, render: Callable[[], RenderedPrompt]) -> RenderedPrompt:
        if characters > self._max_characters:
            raise InvalidRequestError(
                f"the request's text has {characters} characters; the model's context of {self._context} "
                f"tokens cannot hold more than {self._max_characters}"
            )
        if characters <= _INLINE_CHARACTERS:
            prompt = render()
        else:
            with self.admission.admitted(characters):
                prompt = await asyncio.to_thread(render)
        if len(prompt.token_ids) >= self._context:
            raise InvalidRequestError(
                f"the prompt has {len(prompt.token_ids)} tokens; the model's context of {self._context} "
                "tokens has no room left for an answer"
            )
        return prompt
