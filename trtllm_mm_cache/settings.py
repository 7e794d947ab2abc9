"""Settings of every role, as frozen pydantic models: one class a role, limits nested in it.

Each default is written here and nowhere else. A field is one command-line flag (`trtllm-mm-cache ROLE
--help` shows the descriptions below), wherever it is nested, and where Dynamo has a name for it, bears
Dynamo's name; `constant` marks values that are settings for the code and its tests, but that no operator
would change: they have no flag, and a reason instead. Engine settings are not here: they live in the YAML
file that `--extra-engine-args` names and belong to the engine.

Units: GB = 1024**3 bytes, MB = 1024**2 bytes, times in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

GB = 1024**3
MB = 1024**2

EngineName = Literal["transformers", "trtllm"]
EvictionPolicyName = Literal["lru", "s3fifo"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]

DEFAULT_NAMESPACE = "dynamo"
DEFAULT_PD_ENDPOINT = f"dyn://{DEFAULT_NAMESPACE}.pd.generate"
DEFAULT_ENCODE_ENDPOINT = f"dyn://{DEFAULT_NAMESPACE}.encode.encode"

Seconds = Annotated[float, Field(gt=0, le=3600)]


def constant(value: Any, reason: str, **bounds: Any) -> Any:
    """Return a field without a flag: `value`, and the reason why no operator would set another."""
    return Field(value, description=reason, json_schema_extra={"constant": True}, **bounds)


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DiscoverySettings(Settings):
    """How a process finds the others."""

    discovery_backend: Literal["file", "etcd", "kubernetes", "mem"] = Field(
        "file",
        description="Where processes find each other: `file` on one machine (folder DYN_FILE_KV), "
        "`etcd` (ETCD_ENDPOINTS) or `kubernetes` in a cluster.",
        json_schema_extra={"env": "DYN_DISCOVERY_BACKEND"},
    )


class RuntimeSettings(DiscoverySettings):
    """What every process that serves has: discovery, and what it logs."""

    log_level: LogLevel = Field("INFO", description="Least severe log line to print.")
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Form of the log lines: `text`, or `json` for one object a line.",
        json_schema_extra={"env": "MM_CACHE_LOG_FORMAT"},
    )


class FrontendSettings(RuntimeSettings):
    """The OpenAI-compatible HTTP server."""

    http_host: str = Field(
        "127.0.0.1", description="Address to listen on.", json_schema_extra={"env": "DYN_HTTP_HOST"}
    )
    http_port: int = Field(
        8000, ge=1, le=65535, description="Port to listen on.", json_schema_extra={"env": "DYN_HTTP_PORT"}
    )


class ImageLimits(Settings):
    """What one image may be. The PD worker reads headers, the encode worker decodes: with equal flags both
    refuse the same images, whatever their names or declared types say."""

    max_file_size_mb: float = Field(
        50, gt=0, le=1024, description="Largest image file accepted, in MB of encoded bytes."
    )
    max_image_megapixels: float = Field(
        89.4,
        gt=0,
        le=178.9,
        description="Largest image accepted, in millions of pixels, checked before decoding.",
    )
    max_side: int = constant(65_535, "Longest side in pixels: JPEG's own limit.", ge=1)
    max_aspect_ratio: float = constant(
        200.0,
        "Most times that one side may be the other; Qwen's own processor has this limit. A processor that "
        "scales the shorter side to 336 pixels makes 88 GB of floats of an image of 1 x 65,535.",
        ge=1,
    )
    formats: frozenset[ImageFormat] = constant(
        frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"}),
        "Formats that are decoded; each has its own checks against hostile files.",
        min_length=1,
    )

    @property
    def max_file_bytes(self) -> int:
        """`max_file_size_mb` in bytes."""
        return int(self.max_file_size_mb * MB)

    @property
    def max_pixels(self) -> int:
        """`max_image_megapixels` in pixels."""
        return int(self.max_image_megapixels * 1e6)


class MediaSettings(Settings):
    """Where media may come from. The defaults are safe for a server that strangers can reach."""

    allowed_local_media_path: Path | None = Field(
        None, description="Folder below which file: URLs may be read. Not set: file: URLs are refused."
    )
    allow_private_addresses: bool = Field(
        False,
        description="Let http(s) image URLs lead to private and loopback addresses. Link-local addresses and "
        "the metadata services of cloud providers stay refused.",
    )
    media_timeout_s: Seconds = Field(
        30, description="Deadline for fetching one image, redirects and the wait for its turn included."
    )
    connect_timeout_s: Seconds = constant(5, "To resolve a media server's name and connect to it.")
    max_redirects: int = constant(3, "Redirects followed for one reference; each is checked anew.", ge=0)
    max_fetches: int = constant(
        64, "http(s) images fetched at a time, and connections: more only share the same line.", ge=1
    )
    http_cache_mb: float = constant(
        64,
        "Memory in MB for fetched files that may be used again or revalidated: some tens of photographs.",
        ge=0,
    )


class EngineSettings(RuntimeSettings):
    """What the two workers share: the model, the engine that runs it, and what an image may be."""

    model_path: str = Field(description="Model directory, or a name on the Hugging Face hub.")
    engine: EngineName = Field(
        "transformers", description="Engine that runs the model: `trtllm` on GPUs, `transformers` anywhere."
    )
    extra_engine_args: Path | None = Field(
        None, description="YAML file with the engine's own settings; see configs/."
    )
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
    max_batch_images: int = Field(8, ge=1, le=1024, description="Most images in one vision-tower batch.")
    preprocess_threads: int = Field(2, ge=1, le=256, description="Threads that decode and preprocess images.")
    max_queued: int = constant(
        256, "Items that may wait for the vision tower: already minutes of a small tower's work.", ge=1
    )

    @property
    def lease_timeout_s(self) -> float:
        """How long an export stays leased for a PD worker that does not READ it: three deadlines."""
        return 3 * self.transfer_timeout_s


class PdSettings(EngineSettings):
    """The prefill+decode worker."""

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
    transfer_arena_mb: float = Field(
        128,
        ge=1,
        le=65536,
        description="Host memory in MB for embeddings that are served but not cached: all of them with "
        "capacity 0, else those that may not enter the cache or for which it is too full of leased entries.",
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
    max_images_per_request: int = Field(32, ge=1, le=4096, description="Most images in one request.")
    media: MediaSettings = MediaSettings()

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model_path).name


class ControlSettings(DiscoverySettings):
    """What the tools share that talk to a running deployment's workers."""

    endpoint: str = Field(DEFAULT_PD_ENDPOINT, description="Dynamo endpoint of the PD workers.")
    encode_endpoint: str = Field(
        DEFAULT_ENCODE_ENDPOINT,
        description="Dynamo endpoint of the encode workers.",
        json_schema_extra={"env": "ENCODE_ENDPOINT"},
    )
    discovery_wait_s: Seconds = constant(
        2, "How long to wait for discovery to name a worker: files take 0.3 s, etcd and Kubernetes under 1 s."
    )


class DropSettings(ControlSettings):
    """What to drop."""

    image: str | None = Field(
        None,
        description="Drop everything that was made of one image, for every salt and with every setting. A "
        "file, or an http(s) or data: URL whose bytes are fetched for that.",
    )
    key: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="Drop one embedding, by its key in hex.",
        json_schema_extra={
            "form": "64 hexadecimal digits in lower case, as each request's log line has them"
        },
    )
    salt: bool = Field(
        False, description="Drop what was stored under one cache_salt, which is read from standard input."
    )
    all: bool = Field(False, description="Drop everything.")
    wait_s: Seconds = constant(10, "How long to wait for embeddings that are on their way to a PD worker.")


class AskSettings(Settings):
    """How to ask a running server."""

    url: str = Field(
        "http://127.0.0.1:8000/v1",
        description="Base URL of the server.",
        json_schema_extra={"env": "OPENAI_BASE_URL"},
    )
    model: str | None = Field(None, description="Model name. Default: the first one the server lists.")
    max_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
    temperature: float = constant(0, "Greedy, so that the same question gets the same answer.", ge=0, le=2)
    timeout_s: Seconds = constant(120, "How long to wait for the whole answer: minutes, on a CPU.")


class PlanSettings(Settings):
    """What is to be cached."""

    model_path: Path = Field(description="Model directory; configuration and tokenizer files are enough.")
    images: int = Field(ge=1, description="Distinct images in the working set.")
    size: str = Field(
        pattern=r"^[1-9]\d*x[1-9]\d*$",
        description="Their size in pixels, as 1024x768.",
        json_schema_extra={"form": "WIDTHxHEIGHT in pixels, as 1024x768"},
    )
    processor_kwargs: str = Field("{}", description="The requests' mm_processor_kwargs, as a JSON object.")
    hit: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Plan for this hit ratio instead of for the whole working set, as in 0.9.",
    )
    zipf: float = constant(
        0.9, "With --hit: how unequal popularity is, Zipf's exponent of web traffic.", ge=0, le=3
    )
    engine: EngineName = Field("transformers", description="Engine of the workers.")
    extra_engine_args: Path | None = Field(
        None, description="The encode worker's engine YAML file: it may name the dtype."
    )
