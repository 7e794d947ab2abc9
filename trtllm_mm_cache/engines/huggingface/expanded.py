"""A prompt with its images expanded and placed, for engines that take tokens, ranges and embeddings.

Every check of a request and its leases that needs no engine is here, before an engine hears of the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding
from trtllm_mm_cache.engines.checks import grid_of
from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.engines.huggingface.embedding_check import placeholder_of
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.errors import IntegrityError, InvalidRequestError, PlaceholderMismatchError

Grid = tuple[int, int, int]
Run = tuple[int, int]
"""First and last position of image tokens that follow each other."""


@dataclass(frozen=True)
class ExpandedPrompt:
    """`images[i]` are the runs of tokens that take the rows of the i-th embedding, in order.

    `grids` is None where the architecture has none. `room` is how many tokens an answer may have.
    """

    token_ids: list[int]
    images: tuple[tuple[Run, ...], ...]
    grids: tuple[Grid, ...] | None
    room: int


@dataclass(frozen=True)
class PromptPlacer:
    """Thread-safe. An engine has a context of `context` tokens, and embeddings for `vocabulary` token ids."""

    architecture: Architecture
    layout: FeatureLayout
    expander: PromptExpander
    context: int
    vocabulary: int

    def __call__(self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]) -> ExpandedPrompt:
        """Expand the request's prompt, and say where each lease's rows go.

        Raises `InvalidRequestError`, `PlaceholderMismatchError` or `EmbeddingMismatchError`.
        """
        placeholders = [placeholder_of(lease.metadata, index) for index, lease in enumerate(leases)]
        self._check_token_ids(request.token_ids)
        token_ids = self.expander.expand(request.token_ids, request.prompt_text, placeholders)
        for index, (lease, placeholder) in enumerate(zip(leases, placeholders, strict=True)):
            self.layout.check(lease.shape, lease.dtype, self.expander.rows_of(placeholder), index)
            _check_handle(lease)
        room = self.context - len(token_ids)
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens with its images expanded; the context of "
                f"{self.context} tokens has no room left for an answer"
            )
        rows = [lease.shape[0] for lease in leases]
        images = runs_of(token_ids, self.expander.config.image_token_id, rows) if leases else ()
        return ExpandedPrompt(token_ids, images, self._grids(leases), room)

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        # The image token itself may lie outside: its embedding is never looked up.
        allowed = {self.expander.config.image_token_id}
        outside = next((id for id in token_ids if not 0 <= id < self.vocabulary and id not in allowed), None)
        if outside is not None:
            raise InvalidRequestError(f"token id {outside} is outside the model's vocabulary")

    def _grids(self, leases: Sequence[LeasedEmbedding]) -> tuple[Grid, ...] | None:
        if not self.architecture.has_grid:
            return None
        merge_size = self.expander.config.vision_config.spatial_merge_size
        return tuple(
            grid_of(lease.metadata, lease.shape[0], merge_size, index) for index, lease in enumerate(leases)
        )


def runs_of(
    token_ids: Sequence[int], image_token_id: int, rows: Sequence[int]
) -> tuple[tuple[Run, ...], ...]:
    """Return for each image the runs of its tokens: the i-th takes the next `rows[i]` image tokens.

    Raises `PlaceholderMismatchError` when the prompt has another number of image tokens.
    """
    positions = [index for index, token in enumerate(token_ids) if token == image_token_id]
    if len(positions) != sum(rows):
        raise PlaceholderMismatchError(
            f"the prompt has {len(positions)} image tokens with its images expanded, the images' embeddings "
            f"have {sum(rows)} rows"
        )
    images, taken = [], 0
    for count in rows:
        images.append(_runs(positions[taken : taken + count]))
        taken += count
    return tuple(images)


def _runs(positions: Sequence[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for position in positions:
        if runs and runs[-1][1] == position - 1:
            runs[-1] = (runs[-1][0], position)
        else:
            runs.append((position, position))
    return tuple(runs)


def _check_handle(lease: LeasedEmbedding) -> None:
    """A process that opens a wrong handle could only end the engine."""
    handle = lease.handle()
    if not 0 <= handle.offset <= handle.offset + handle.nbytes <= handle.storage_bytes:
        raise IntegrityError("a leased embedding lies outside its arena")
