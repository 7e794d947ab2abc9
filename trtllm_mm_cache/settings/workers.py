"""Settings of the two kinds of worker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from trtllm_mm_cache.flags import flag
from trtllm_mm_cache.settings.base import (
    DEFAULT_ENCODE_ENDPOINT,
    DEFAULT_PD_ENDPOINT,
    GB,
    MB,
    EngineName,
    EvictionPolicyName,
    RuntimeSettings,
    Seconds,
    constant,
)
from trtllm_mm_cache.settings.media import ImageLimits, MediaSettings
from trtllm_mm_cache.settings.tiers import TierSettings


class WorkerSettings(RuntimeSettings):
    """What the two workers share besides the model: what an image may be, and how long a READ may take."""

    images: ImageLimits = ImageLimits()
    max_waiting_image_mb: float = Field(
        1024,
        ge=1,
        description="Bytes of image files, in MB, that may wait for their embeddings; beyond it a new image "
        "is answered 503, and cached ones are still served.",
    )
    transfer_timeout_s: Seconds = Field(
        10,
        description="Deadline of one READ: past it the PD worker quarantines the extent until the READ "
        "settles. An encode worker keeps an export for three times as long when it is not READ.",
    )


class EngineSettings(WorkerSettings):
    """One worker: the model, the engine that runs it, and the port for probes."""

    model_path: str = Field(description="Model directory, or a name on the Hugging Face hub.")
    engine: EngineName = Field(
        "transformers",
        description="Engine that runs the model: `trtllm` on GPUs, `vllm` and `sglang` on GPUs or the CPU, "
        "`transformers` anywhere.",
    )
    extra_engine_args: Path | None = Field(
        None, description="YAML file with the engine's own settings; see configs/."
    )
    system_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port for probes and metrics: /health, /live and /metrics. Not set: none is opened.",
        json_schema_extra={"env": "DYN_SYSTEM_PORT"},
    )
    system_host: str | None = Field(
        None,
        description="Address that --system-port listens on. Default: loopback with `file` discovery, or all.",
        json_schema_extra={"env": "DYN_SYSTEM_HOST"},
    )


class EncodeSettings(EngineSettings):
    """The encode worker."""

    endpoint: str = Field(
        DEFAULT_ENCODE_ENDPOINT,
        description="Dynamo endpoint to serve, as dyn://namespace.component.endpoint.",
    )
    multimodal_embedding_cache_capacity_gb: float = Field(
        0.25,
        ge=0.001,
        le=1024,
        description="Size of the encode worker's own arena in GB. What it exports lies there, and it is "
        "a second level of cache for all PD workers. Committed in full at start.",
    )
    multimodal_embedding_cache_policy: EvictionPolicyName = Field(
        "lru", description="What leaves the arena first when it is full, as on the PD worker."
    )
    tiers: TierSettings = TierSettings()
    max_batch_images: int = Field(8, ge=1, le=1024, description="Most images in one vision-tower batch.")
    preprocess_threads: int = Field(2, ge=1, le=256, description="Threads that decode and preprocess images.")
    max_prepared_mb: float = Field(
        1024,
        ge=1,
        description="Memory in MB for preprocessed images, in the vision tower or waiting for it; each of "
        "--preprocess-threads may go beyond it by one image. Further images wait as files.",
    )
    max_queued: int = constant(
        256, "Items that may wait for the vision tower: already minutes of a small tower's work.", ge=1
    )

    @property
    def arena_bytes(self) -> dict[str, int]:
        """Size in bytes of the arena, by the flag that sets it."""
        name = flag("multimodal_embedding_cache_capacity_gb")
        return {name: int(self.multimodal_embedding_cache_capacity_gb * GB)}

    @property
    def lease_timeout_s(self) -> float:
        """How long an export stays leased for a PD worker that does not READ it: three deadlines."""
        return 3 * self.transfer_timeout_s


class PdOptions(WorkerSettings):
    """What is set of a prefill+decode worker whatever its model."""

    served_model_name: str | None = Field(
        None, description="Model name that clients use. Default: the last part of --model-path."
    )
    endpoint: str = Field(
        DEFAULT_PD_ENDPOINT, description="Dynamo endpoint to serve, as dyn://namespace.component.endpoint."
    )
    encode_endpoint: str = Field(
        DEFAULT_ENCODE_ENDPOINT,
        description="Dynamo endpoint of the encode workers.",
        json_schema_extra={"env": "ENCODE_ENDPOINT"},
    )
    disaggregation_mode: Literal["pd", "agg"] = Field(
        "pd",
        description="Who runs the vision tower: with `pd` encode workers; with `agg` the PD worker's engine, "
        "which must be `vllm`, and there are no encode workers.",
    )
    multimodal_embedding_cache_capacity_gb: float = Field(
        0,
        ge=0,
        le=4096,
        description="Host memory for cached embeddings in GB, committed in full at start. "
        "0: nothing is retained.",
    )
    multimodal_embedding_cache_policy: EvictionPolicyName = Field(
        "lru",
        description="What leaves a full cache first: `lru` the least recently used, `s3fifo` what was not "
        "used again soon, so that many images seen once do not push out those that come back.",
    )
    multimodal_embedding_cache_require_salt: bool = Field(
        False,
        description="Let only requests that carry a `cache_salt` share embeddings, each with those of the "
        "same salt. Requests without one are served past the cache and share nothing.",
    )
    tiers: TierSettings = TierSettings()
    transfer_arena_mb: float = Field(
        128,
        ge=1,
        le=65536,
        description="Host memory in MB for embeddings that are served but not cached: all of them with "
        "capacity 0, else those that may not enter the cache or for which it is too full of leased entries.",
    )
    transfer: Literal["auto", "nixl"] = Field(
        "auto",
        description="How embeddings come from encode workers: `auto` copies from the mapped arena of one on "
        "the same machine, of the same user, and READs by NIXL from all others; `nixl` READs from all.",
    )
    encode_timeout_s: Seconds = Field(
        60,
        description="Deadline for one missing embedding: encode, transfer and the one retry together. The "
        "first encode worker gets half of it where there is another one to ask.",
    )
    breaker_failures: int = constant(
        3, "Failures in a row after which an encode worker is passed over; two may be chance.", ge=1
    )
    breaker_retry_s: Seconds = constant(1, "How often one request tries such an encode worker again.")
    max_concurrent_requests: int = Field(
        1024, ge=1, description="Requests taken at a time; beyond it the answer is 503."
    )
    max_prompt_logprobs: int = Field(
        65536,
        ge=0,
        le=1024 * 1024,
        description="Most log probabilities of one request's prompt (`prompt_logprobs`): its tokens, images "
        "included, times the entries of each. 0: such requests are refused.",
    )
    allow_unproven_requests: bool = Field(
        False,
        description="Answer requests without the deployment's secret too, such as those of Dynamo's own "
        "frontend. Whoever reaches this worker's ports can then ask it, with any cache_salt.",
        json_schema_extra={"env": "MM_CACHE_ALLOW_UNPROVEN_REQUESTS"},
    )
    max_images_per_request: int = Field(32, ge=1, le=4096, description="Most images in one request.")
    max_incoming_image_mb: float = Field(
        256,
        ge=1,
        description="Bytes of image files, in MB, that may be on their way in, inside requests or being "
        "fetched, until their keys are known. Beyond it a request with large images is answered 503, and one "
        "that has more alone 400.",
    )
    media: MediaSettings = MediaSettings()

    @property
    def arena_bytes(self) -> dict[str, int]:
        """Sizes in bytes of cache and transit arena, by the flags that set them.

        An aggregated worker has no transit arena: what is not cached stays inside its engine.
        """
        cache = int(self.multimodal_embedding_cache_capacity_gb * GB)
        transit = 0 if self.is_aggregated else int(self.transfer_arena_mb * MB)
        return {flag("multimodal_embedding_cache_capacity_gb"): cache, flag("transfer_arena_mb"): transit}

    @property
    def is_aggregated(self) -> bool:
        """Whether the PD worker's engine runs the vision tower itself."""
        return self.disaggregation_mode == "agg"


class PdSettings(PdOptions, EngineSettings):
    """The prefill+decode worker."""

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model_path).name
