"""The two seams of an engine: `VisionEncoder` on the encode worker, `Generator` on the PD worker.

One contract suite (`tests/engines/`) runs over every implementation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import Kind
from trtllm_mm_cache.errors import MmCacheError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class EncodeItem:
    """One decoded item (an image) and how it is to be processed.

    `variant` is what `Generator.variant` said for the request: some architectures tile an image
    differently when it is not alone in its prompt. It is part of the embedding's key.
    """

    image: Image.Image
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""


@dataclass(frozen=True)
class ItemDescription:
    """What the PD worker knows of an item that it has not decoded.

    `width` and `height` are in pixels as stored, before any EXIF orientation; the rest as in `EncodeItem`.
    """

    width: int
    height: int
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    kind: Kind = "image"


@dataclass(frozen=True)
class EncodedItem:
    """The vision tower's output for one item.

    `tensor` is contiguous, `[rows, width]`; deepstack features, where the architecture has them,
    lie beside the row in the width (`width = hidden * (1 + levels)`). It is on any device, its values are
    there, and it may be a view that keeps its whole batch: read it soon and do not write to it.
    `metadata` is all that the generator needs besides the tensor: the grid, and the text that the item's
    placeholder expands to.
    """

    tensor: torch.Tensor
    metadata: EmbeddingMetadata


class LeasedEmbedding(Protocol):
    """What an engine sees of a lease: the embedding, in place, valid until the release."""

    @property
    def key(self) -> str:
        """64 hexadecimal digits that name the content: equal keys have equal bytes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the embedding."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """`[rows, width]`."""
        ...

    @property
    def metadata(self) -> EmbeddingMetadata:
        """What the engine's encoder said of it."""
        ...

    @property
    def tensor(self) -> torch.Tensor:
        """A view for this process, valid as long as it or an alias of it is alive. Do not write to it."""
        ...

    def handle(self, *, openers: int = 0) -> Handle:
        """Return how another process opens it; valid only while the lease is held."""
        ...

    def clone(self) -> LeasedEmbedding:
        """Return another lease on the embedding, released on its own."""
        ...

    def release(self) -> None:
        """Let go. Idempotent."""
        ...


@dataclass(frozen=True)
class EmbeddingShape:
    """What an item's embedding will be, known without encoding it: `[rows, width]` of `dtype`."""

    rows: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.width * self.dtype.itemsize


class VisionEncoder(Protocol):
    """Images to embeddings. Blocking: the encode worker calls it from worker threads."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides an embedding's bytes besides the image and its kwargs."""
        ...

    def preprocess(self, item: EncodeItem) -> Any:
        """Turn one image into the tower's input. Thread-safe.

        Raises `InvalidRequestError` for unknown or ill-typed `processor_kwargs`, `InvalidImageError`
        for an image the model's processor refuses.
        """
        ...

    def prepared_bytes(self, prepared: Any) -> int:
        """Return the memory that one image's `preprocess` result takes, in bytes."""
        ...

    def encode(self, batch: Sequence[Any]) -> list[EncodedItem | MmCacheError]:
        """Run the tower over preprocessed images; one result or error for each, in order.

        One call at a time. An image that fails does not spoil the others of its batch.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class Constraint:
    """What an answer must be: JSON that fits the JSON schema in `text`, or all of it a match of the regex."""

    kind: Literal["json_schema", "regex"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; field names as in OpenAI's API and Dynamo's request.

    `temperature` 0 or None is greedy. `max_tokens` None means up to the model's context length.
    `logit_bias` is added to the logits of token ids. `presence_penalty` and `frequency_penalty` look at the
    answer's tokens, `repetition_penalty` (1 is none) at the prompt's too. `min_p` keeps tokens of at least
    that share of the likeliest one's probability. `logprobs` is how many of the likeliest tokens are
    reported at each place of the answer beside the chosen one's log probability; None reports nothing.
    `prompt_logprobs` is the same for the prompt's own tokens. `choices` is how many answers are drawn for the
    one prompt.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    choices: int = 1


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, as the frontend tokenised it: one image placeholder for each image.

    `prompt_text` is the rendered template, where the frontend sends it; engines that expand
    placeholders in text prefer it over decoding `token_ids`. `lora_name` is one of the adapters that the
    generator has loaded, None for the base model.
    """

    request_id: str
    token_ids: tuple[int, ...]
    prompt_text: str | None
    sampling: SamplingParams
    cache_salt: str | None = None
    lora_name: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log probability by the model alone: before bias, penalties, temperature and cuts."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PlaceLogprobs:
    """The log probabilities at one place of an answer: the chosen token's, and those of the likeliest.

    `likeliest` are as many as `SamplingParams.logprobs` says, best first; the chosen one may be among them.
    """

    chosen: TokenLogprob
    likeliest: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a prompt's tokens but the first: what the model gave each after those before it.

    Of each token `width` entries, one behind the other in each sequence: its own, then those of the likeliest
    tokens there, best first. `ranks` count from 1 among the vocabulary. Flat, for a prompt with images has
    thousands of tokens, most of which are an image's placeholder.
    """

    width: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    ranks: Sequence[int]


@dataclass(frozen=True)
class TokenDelta:
    """Tokens that are new since the choice's last delta. The last delta of each has a `finish_reason`.

    `prompt_tokens` counts the prompt after the placeholders were expanded; for `cached_tokens` of them the
    engine had keys and values already, None where it does not say. `logprobs` has one entry for each
    token where the request asked for them, and is empty otherwise. `choice` counts from 0. One delta has the
    `prompt_logprobs` of a request that asked for them.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[PlaceLogprobs, ...] = ()
    choice: int = 0
    cached_tokens: int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Generator(Protocol):
    """Prompts and embeddings to tokens."""

    @property
    def fingerprint(self) -> str:
        """Equal to the `VisionEncoder.fingerprint` whose embeddings this generator accepts."""
        ...

    async def load_adapters(self) -> Sequence[str]:
        """Load the LoRA adapters that the settings name, and return the names that requests may give.

        To be called once, in the event loop of the requests, before the first. Raises `ConfigurationError`.
        """
        ...

    def variant(self, image_count: int) -> str:
        """Say how a prompt with `image_count` images has them encoded; "" where it makes no difference."""
        ...

    def check_embedding(
        self, item: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: EmbeddingMetadata
    ) -> None:
        """Raise `EmbeddingMismatchError` when this cannot be an embedding of that item for this model.

        Called before a byte of it is read, with what an encode worker says of it. Must not block.
        """
        ...

    def generate(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]
    ) -> AsyncGenerator[TokenDelta]:
        """Stream tokens. `leases` stand in prompt order, one for each placeholder.

        The caller keeps the leases until the iterator has ended; the engine reads their views and
        does not copy them as a whole. Closing the generator stops the computation.
        Raises `PlaceholderMismatchError` when images and placeholders disagree,
        `EmbeddingMismatchError` when an embedding does not fit the model.
        """
        ...

    async def failed(self) -> None:
        """Return only by raising `EngineLostError`, once the engine's own processes are gone.

        An engine that computes in this process never returns. Cancelling has no effect on anything else.
        """
        ...

    async def close(self) -> None:
        """Stop what runs and free the model."""
        ...
