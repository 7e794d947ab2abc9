"""A request and its leases to the model's inputs, with every check that needs no computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding, SamplingParams
from trtllm_mm_cache.engines.checks import (
    check_no_prompt_logprobs,
    check_one_choice,
    check_sampling,
    grid_of,
)
from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.engines.huggingface.embedding_check import placeholder_of
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.engines.transformers.constraint import FollowedConstraint
from trtllm_mm_cache.errors import InvalidRequestError, PlaceholderMismatchError


@dataclass(frozen=True)
class PreparedRequest:
    """`inputs` go to `generate` as they are, and `embeddings`, views of the leases', beside them.

    `max_new_tokens` fits the context.

    `handles` say where other ranks find the embeddings; empty where there are no other ranks. `constraint`
    holds the answer to a schema or pattern.
    """

    inputs: Mapping[str, Any]
    handles: tuple[Handle, ...]
    prompt_tokens: int
    max_new_tokens: int
    sampling: SamplingParams
    constraint: FollowedConstraint | None = None
    embeddings: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class RequestPreparer:
    """Thread-safe. `context` is the longest prompt with its answer, in tokens.

    `vocabulary` is the number of token ids that have an embedding. `share` returns the embeddings' handles
    for other ranks.
    """

    architecture: Architecture
    layout: FeatureLayout
    expander: PromptExpander
    context: int
    vocabulary: int
    device: torch.device
    share: Callable[[Sequence[LeasedEmbedding]], tuple[Handle, ...]]

    def __call__(self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]) -> PreparedRequest:
        """Check and expand. The inputs hold views of the leases' embeddings, no copies.

        Raises `InvalidRequestError`, `PlaceholderMismatchError` or `EmbeddingMismatchError`.
        """
        check_sampling(request.sampling)
        check_one_choice(request.sampling)
        check_no_prompt_logprobs(request.sampling)
        self._check_token_ids(request.token_ids)
        for token_id in request.sampling.logit_bias:
            if not 0 <= token_id < self.vocabulary:
                raise InvalidRequestError(f"logit_bias: token id {token_id} is outside the vocabulary")
        placeholders = [placeholder_of(lease.metadata, index) for index, lease in enumerate(leases)]
        token_ids = self.expander.expand(request.token_ids, request.prompt_text, placeholders)
        for index, (lease, placeholder) in enumerate(zip(leases, placeholders, strict=True)):
            self.layout.check(lease.shape, lease.dtype, self.expander.rows_of(placeholder), index)
        room = self.context - len(token_ids)
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens with its images expanded; the context of "
                f"{self.context} tokens has no room left for an answer"
            )
        self._check_gaps(token_ids, len(leases))
        inputs = self._text_inputs(token_ids) | self._image_inputs(leases)
        wanted = request.sampling.max_tokens
        return PreparedRequest(
            inputs,
            self.share(leases),
            len(token_ids),
            room if wanted is None else min(room, wanted),
            request.sampling,
            embeddings=tuple(lease.tensor for lease in leases),
        )

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        # The image token itself may lie outside: its embedding is never looked up.
        allowed = {self.expander.config.image_token_id}
        outside = next((id for id in token_ids if not 0 <= id < self.vocabulary and id not in allowed), None)
        if outside is not None:
            raise InvalidRequestError(f"token id {outside} is outside the model's vocabulary")

    def _check_gaps(self, token_ids: list[int], images: int) -> None:
        """Raise when two images touch and the decoder, which numbers positions by runs, would see one."""
        image_token_id = self.expander.config.image_token_id
        runs = sum(is_image for is_image, _ in groupby(token == image_token_id for token in token_ids))
        if self.architecture.has_grid and runs != images:
            raise PlaceholderMismatchError(
                "two images touch in the prompt; this model needs text between them"
            )

    def _text_inputs(self, token_ids: list[int]) -> dict[str, torch.Tensor]:
        """Return what the model's processor makes of the prompt's text."""
        input_ids = torch.tensor([token_ids], device=self.device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.architecture.type_ids_argument is not None:
            types = self.expander.processor.create_mm_token_type_ids([token_ids])
            inputs[self.architecture.type_ids_argument] = torch.tensor(types, device=self.device)
        return inputs

    def _image_inputs(self, leases: Sequence[LeasedEmbedding]) -> dict[str, Any]:
        if not leases:
            return {}
        inputs: dict[str, Any] = {}
        if self.architecture.has_grid:
            merge_size = self.expander.config.vision_config.spatial_merge_size
            inputs["image_grid_thw"] = torch.tensor(
                [
                    grid_of(lease.metadata, lease.shape[0], merge_size, index)
                    for index, lease in enumerate(leases)
                ],
                device=self.device,
            )
        return inputs
