"""A request and its leases to the arguments of SGLang's `async_generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding
from trtllm_mm_cache.engines.huggingface.expanded import PromptPlacer
from trtllm_mm_cache.engines.sglang.engine_input import EngineInputs
from trtllm_mm_cache.engines.sglang.sampling import engine_sampling


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """Keyword arguments of `async_generate` for each choice; their handles point into `leases` (clones)."""

    choices: tuple[dict[str, Any], ...]
    leases: tuple[LeasedEmbedding, ...]

    def release(self) -> None:
        """Release what the handles point into, once no scheduler reads it any more."""
        for lease in self.leases:
            lease.release()


@dataclass(frozen=True)
class RequestPreparer:
    """Thread-safe."""

    place: PromptPlacer
    inputs: EngineInputs
    deterministic: bool

    def __call__(self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]) -> PreparedRequest:
        """Check the request and describe it to the engine. No byte of an embedding is read.

        Raises `InvalidRequestError`, `PlaceholderMismatchError` or `EmbeddingMismatchError`.
        """
        prompt = self.place(request, leases)
        sampling = engine_sampling(
            request.sampling, prompt.room, self.place.vocabulary, deterministic=self.deterministic
        )
        likeliest = request.sampling.logprobs
        common = {
            "input_ids": prompt.token_ids,
            "return_logprob": likeliest is not None,
            "top_logprobs_num": likeliest or 0,
            "cache_salt": request.cache_salt,
            "stream": True,
        }
        handed = tuple(lease.clone() for lease in leases)
        return PreparedRequest(
            tuple(common | {"sampling_params": each, **self._images(prompt, handed)} for each in sampling),
            handed,
        )

    def _images(self, prompt: Any, leases: Sequence[LeasedEmbedding]) -> dict[str, Any]:
        """Return the images of one choice: SGLang fills in fields of it, so each choice has its own."""
        if not leases:
            return {}
        token = self.place.expander.config.image_token_id
        return {"image_data": [self.inputs.engine_input(prompt, leases, token)]}
