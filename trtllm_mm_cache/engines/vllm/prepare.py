"""A request and its leases to the arguments of `AsyncLLM.generate`, with every check that the workers need.

A worker that finds a handle wrong could only end the engine. So all that it relies on is checked here, before
vLLM hears of the request: rows, width, dtype, that the handle lies within its arena, that vLLM has room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding
from trtllm_mm_cache.engines.checks import fit_for_client, grid_of
from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.engines.huggingface.embedding_check import placeholder_of
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.engines.vllm.engine_input import Grid, engine_input, place_images
from trtllm_mm_cache.engines.vllm.handles import load_entry
from trtllm_mm_cache.engines.vllm.sampling import engine_constraint, engine_sampling
from trtllm_mm_cache.errors import IntegrityError, InvalidRequestError


@dataclass(frozen=True)
class EngineLimits:
    """What vLLM has: `context` tokens for a prompt with its answer, room for `rows` of one image at a time.

    `vocabulary` is the number of token ids that have an embedding.
    """

    context: int
    rows: int
    vocabulary: int


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """`prompt` and `sampling` go to `AsyncLLM.generate`; the handles in it point into `leases` (clones)."""

    prompt: Any
    sampling: Any
    leases: tuple[LeasedEmbedding, ...] = field(default=())


@dataclass(frozen=True)
class RequestPreparer:
    """Thread-safe."""

    architecture: Architecture
    layout: FeatureLayout
    expander: PromptExpander
    limits: EngineLimits

    def __call__(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding], epoch: int
    ) -> PreparedRequest:
        """Check the request and describe it to the engine. No byte of an embedding is copied.

        Identifiers of different `epoch`s are different images to vLLM.
        Raises `InvalidRequestError`, `PlaceholderMismatchError` or `EmbeddingMismatchError`.
        """
        placeholders = [placeholder_of(lease.metadata, index) for index, lease in enumerate(leases)]
        self._check_token_ids(request.token_ids)
        token_ids = self.expander.expand(request.token_ids, request.prompt_text, placeholders)
        for index, (lease, placeholder) in enumerate(zip(leases, placeholders, strict=True)):
            self._check_lease(lease, self.expander.rows_of(placeholder), index)
        room = self.limits.context - len(token_ids)
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens with its images expanded; the context of "
                f"{self.limits.context} tokens has no room left for an answer"
            )
        sampling = engine_sampling(request.sampling, room, self.limits.vocabulary)
        constraint = engine_constraint(request.sampling)
        rows = [lease.shape[0] for lease in leases]
        placed = place_images(token_ids, self.expander.config.image_token_id, rows) if leases else []
        identifiers = [f"{lease.key}.{epoch}" if epoch else lease.key for lease in leases]
        prompt = engine_input(token_ids, identifiers, placed, self._grids(leases), request.cache_salt)
        if leases:
            handles = zip(identifiers, (lease.handle() for lease in leases), strict=True)
            entries = {identifier: load_entry(handle) for identifier, handle in handles}
            sampling["extra_args"] = {"ec_transfer_params": entries}
        params = _sampling_params(sampling, constraint)
        return PreparedRequest(prompt, params, tuple(lease.clone() for lease in leases))

    def _check_token_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        # The image token itself may lie outside: its embedding is never looked up.
        allowed = {self.expander.config.image_token_id}
        size = self.limits.vocabulary
        outside = next((id for id in token_ids if not 0 <= id < size and id not in allowed), None)
        if outside is not None:
            raise InvalidRequestError(f"token id {outside} is outside the model's vocabulary")

    def _check_lease(self, lease: LeasedEmbedding, rows: int, index: int) -> None:
        self.layout.check(lease.shape, lease.dtype, rows, index)
        if rows > self.limits.rows:
            raise InvalidRequestError(
                f"it has {rows} tokens, more than the {self.limits.rows} that this server's engine holds of "
                "one image (max_num_batched_tokens): send a smaller image",
                item_index=index,
            )
        handle = lease.handle()
        if not 0 <= handle.offset <= handle.offset + handle.nbytes <= handle.storage_bytes:
            raise IntegrityError("a leased embedding lies outside its arena")

    def _grids(self, leases: Sequence[LeasedEmbedding]) -> list[Grid] | None:
        if not self.architecture.has_grid:
            return None
        merge_size = self.expander.config.vision_config.spatial_merge_size
        return [
            grid_of(lease.metadata, lease.shape[0], merge_size, index) for index, lease in enumerate(leases)
        ]


def _sampling_params(sampling: dict[str, Any], constraint: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    try:
        if constraint is not None:
            sampling["structured_outputs"] = StructuredOutputsParams(**constraint)
        return SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
    except (VLLMClientError, ValueError) as error:
        reason = fit_for_client(error, "its parameters do not fit the engine")
        raise InvalidRequestError(f"vLLM refuses the request: {reason}") from error
