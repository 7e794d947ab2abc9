"""The prompt as TensorRT-LLM takes it when embeddings come by handle: text, with one placeholder an image.

The engine tokenises that text itself, with its tokenizer's own special tokens, and expands each
placeholder to as many tokens as its embedding has rows. Positions and token counts must be those of the
tokens it will get, so they are found here in the same way, and a text that gives other tokens than the
frontend counted is not sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.engines.base import GenerationRequest
from trtllm_mm_cache.errors import InvalidRequestError, PlaceholderMismatchError


@dataclass(frozen=True)
class EnginePrompt:
    """`text` for the engine, and the tokens that it will make of it, placeholders unexpanded."""

    text: str
    token_ids: list[int]


class PromptReader:
    """Finds the text of a request. Thread-safe: the tokenizer is only asked, never changed.

    `placeholder_ids` are the tokens that the engine takes as placeholders; the first is the image's.
    """

    def __init__(self, tokenizer: Any, placeholder_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._image_token_id, *self._other_ids = placeholder_ids

    def read(self, request: GenerationRequest, images: int) -> EnginePrompt:
        """Return the prompt for `images` images.

        The engine may put a beginning-of-sequence token before the frontend's tokens (LLaVA's templates
        leave it to the tokenizer); a template that writes one itself does not get a second.
        Raises `PlaceholderMismatchError`, or `InvalidRequestError` when no text gives these tokens.
        """
        wanted = list(request.token_ids)
        self._check_placeholders(wanted, images)
        with_beginning: EnginePrompt | None = None
        for text in self._texts(request):
            token_ids = list(self._tokenizer(text).input_ids)
            if token_ids == wanted:
                return EnginePrompt(text, token_ids)
            if with_beginning is None and token_ids == [self._tokenizer.bos_token_id, *wanted]:
                with_beginning = EnginePrompt(text, token_ids)
        if with_beginning is None:
            raise InvalidRequestError(
                "TensorRT-LLM takes a prompt with images as text, and no text gives these tokens: send "
                "messages or text instead of token ids"
            )
        return with_beginning

    def _texts(self, request: GenerationRequest) -> Iterator[str]:
        decoded = str(
            self._tokenizer.decode(
                list(request.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        beginning = self._tokenizer.bos_token or ""
        for text in (request.prompt_text, decoded):
            if text is not None:
                yield text
                if beginning and text.startswith(beginning):
                    yield text.removeprefix(beginning)

    def _check_placeholders(self, token_ids: list[int], images: int) -> None:
        found = token_ids.count(self._image_token_id)
        if found != images or any(token in token_ids for token in self._other_ids):
            raise PlaceholderMismatchError(
                f"the prompt has {found} image placeholders for {images} images; placeholders of images and "
                "videos must not be part of a message's text"
            )
