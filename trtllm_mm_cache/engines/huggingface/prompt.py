"""Expand image placeholders exactly as the model's own processor does.

A processor expands in text and tokenises afterwards, so tokens can merge across the edge between
the user's text and the expansion: Gemma 3's begins and ends with two newlines, which become one
token with a newline next to them. Expanding in token ids alone gives another prompt there.

Of thousands of image tokens in a row the tokenizer sees one: it never merges that with anything, and 2,700 of
them took it 2.5 ms, more than all else that a hit costs beside its copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedConfig, ProcessorMixin

from trtllm_mm_cache.errors import PlaceholderMismatchError


class PromptExpander:
    """Thread-safe: the tokenizer is used in one way only, which changes nothing in it."""

    def __init__(self, processor: ProcessorMixin, config: PreTrainedConfig) -> None:
        self.processor = processor
        self.config = config
        self._tokenizer = processor.tokenizer
        self._placeholder_id = self._tokenizer.convert_tokens_to_ids(processor.image_token)
        self._image_token_id = config.image_token_id
        self._atomic_ids = frozenset(self._tokenizer.added_tokens_decoder)
        self._image_token = self._tokenizer.convert_ids_to_tokens(config.image_token_id)
        self._runs = self._runs_of_image_tokens()
        video_token = getattr(processor, "video_token", None)
        media_ids = {
            config.image_token_id,
            video_token and self._tokenizer.convert_tokens_to_ids(video_token),
        }
        self._reserved_ids = (media_ids & self._atomic_ids) - {self._placeholder_id}

    def rows_of(self, placeholder: str) -> int:
        """Return how many image tokens the text holds; each takes one row of the embedding."""
        return placeholder.count(self._image_token)

    def tokens_of(self, text: str) -> list[int]:
        """Return what the tokenizer makes of a text, with nothing added before or behind."""
        return self._encode(text)

    def expand(
        self, token_ids: Sequence[int], prompt_text: str | None, placeholders: Sequence[str]
    ) -> list[int]:
        """Return the prompt with its i-th placeholder replaced by the tokens of `placeholders[i]`.

        `token_ids` is the prompt as the frontend tokenised it and decides what the prompt is;
        `prompt_text` serves only if it gives these tokens, and then the processor's own text is
        tokenised. Without it the expansion is put between the tokens, and the plain text that touches
        it is tokenised again together with it.
        Raises `PlaceholderMismatchError` when the prompt has another number of placeholders, which is
        also what a placeholder typed by the user comes to.
        """
        self._check(token_ids, len(placeholders))
        if not placeholders:
            return list(token_ids)
        return self._expand_text(list(token_ids), prompt_text, placeholders)

    def _check(self, token_ids: Sequence[int], images: int) -> None:
        found = sum(token == self._placeholder_id for token in token_ids)
        if found != images:
            raise PlaceholderMismatchError(
                f"the prompt has {found} image placeholders for {images} images; the placeholder "
                f"{self.processor.image_token} must not be part of a message's text"
            )
        reserved = next((token for token in token_ids if token in self._reserved_ids), None)
        if reserved is not None:
            name = self._tokenizer.convert_ids_to_tokens(reserved)
            raise PlaceholderMismatchError(
                f"the prompt holds {name}, which must not be part of a message's text"
            )

    def _expand_text(
        self, token_ids: list[int], prompt_text: str | None, placeholders: Sequence[str]
    ) -> list[int]:
        if prompt_text is not None:
            for special in (False, True):
                if self._encode(prompt_text, special) == token_ids:
                    (expanded,), _ = self.processor.get_text_with_replacements(
                        [prompt_text], list(placeholders)
                    )
                    return self._encode(expanded, special)
        return self._splice(token_ids, placeholders)

    def _splice(self, token_ids: list[int], placeholders: Sequence[str]) -> list[int]:
        """Expand between token ids, retokenising only the plain text that touches an expansion."""
        first, *rest = self._segments(token_ids)
        spliced = first
        for placeholder, following in zip(placeholders, rest, strict=True):
            left = self._plain_run(spliced[::-1])[::-1]
            right = self._plain_run(following)
            middle = self._merge(left, placeholder, right)
            spliced = [*spliced[: len(spliced) - len(left)], *middle, *following[len(right) :]]
        return spliced

    def _segments(self, token_ids: list[int]) -> list[list[int]]:
        segments: list[list[int]] = [[]]
        for token in token_ids:
            if token == self._placeholder_id:
                segments.append([])
            else:
                segments[-1].append(token)
        return segments

    def _plain_run(self, token_ids: list[int]) -> list[int]:
        """Return the leading tokens up to the first added one: nothing merges across an added token."""
        for position, token in enumerate(token_ids):
            if token in self._atomic_ids:
                return token_ids[:position]
        return token_ids

    def _merge(self, left: list[int], placeholder: str, right: list[int]) -> list[int]:
        before, after = self._decode(left), self._decode(right)
        if self._encode(before) == left and self._encode(after) == right:
            return self._encode(before + placeholder + after)
        return [*left, *self._encode(placeholder), *right]

    def _runs_of_image_tokens(self) -> re.Pattern[str] | None:
        """Return what matches them; None where the token is no added one, or takes what stands beside it."""
        added = self._tokenizer.added_tokens_decoder.get(self._image_token_id)
        if added is None or added.lstrip or added.rstrip or added.single_word:
            return None
        return re.compile(f"(?:{re.escape(self._image_token)})+")

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        runs = [] if self._runs is None else [len(run) for run in self._runs.findall(text)]
        if self._runs is not None:
            text = self._runs.sub(lambda _: self._image_token, text)
        token_ids = list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if not runs:
            return token_ids
        following = iter(runs)
        expanded: list[int] = []
        for token in token_ids:
            count = next(following) // len(self._image_token) if token == self._image_token_id else 1
            expanded += [token] * count
        return expanded

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
