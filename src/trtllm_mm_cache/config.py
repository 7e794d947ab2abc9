"""Settings of every role, as frozen pydantic models.

One class a role; each field is one command-line flag (`trtllm-mm-cache ROLE --help` shows the
descriptions below) and, where Dynamo has a name for it, bears Dynamo's name. Engine settings are
not here: they live in the YAML file that `--extra-engine-args` names and belong to the engine.

Units: GB = 1024**3 bytes, MB = 1024**2 bytes, times in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_mm_cache.errors import ConfigurationError

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


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RuntimeSettings(Settings):
    """How a process finds the others. Every role has these."""

    discovery_backend: Literal["file", "etcd", "kubernetes", "mem"] = Field(
        "file",
        description="Where processes find each other: `file` on one machine (folder DYN_FILE_KV), "
        "`etcd` (ETCD_ENDPOINTS) or `kubernetes` in a cluster.",
        json_schema_extra={"env": "DYN_DISCOVERY_BACKEND"},
    )
    request_plane: Literal["tcp", "nats"] = Field(
        "tcp", description="Transport of requests.", json_schema_extra={"env": "DYN_REQUEST_PLANE"}
    )
    event_plane: Literal["zmq", "nats"] = Field(
        "zmq", description="Transport of events.", json_schema_extra={"env": "DYN_EVENT_PLANE"}
    )
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


class EngineSettings(RuntimeSettings):
    """What the two workers share: the model and the engine that runs it."""

    model_path: str = Field(description="Model directory, or a name on the Hugging Face hub.")
    engine: EngineName = Field(
        "transformers", description="Engine that runs the model: `trtllm` on GPUs, `transformers` anywhere."
    )
    extra_engine_args: Path | None = Field(
        None, description="YAML file with the engine's own settings; see configs/."
    )
    max_file_size_mb: float = Field(
        50, gt=0, le=1024, description="Largest image file accepted, in MB of encoded bytes."
    )
    max_image_megapixels: float = Field(
        89.4,
        gt=0,
        le=178.9,
        description="Largest image accepted, in millions of pixels, checked before decoding.",
    )
    max_image_side: int = Field(
        65_535, ge=1, description="Longest side of an image in pixels, checked before decoding."
    )
    max_image_aspect_ratio: float = Field(
        200,
        ge=1,
        description="Most times that an image may be longer than wide, or wider than long. Processors that "
        "scale by the shorter side make gigabytes of a narrow strip.",
    )
    image_formats: tuple[ImageFormat, ...] = Field(
        ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"),
        min_length=1,
        description="Image format that is decoded; give the flag once for each.",
    )
    transfer_timeout_s: Seconds = Field(
        10, description="Deadline of one NIXL READ; past it the extent is quarantined until the READ settles."
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
    max_batch_wait_ms: float = Field(
        2, ge=0, le=1000, description="Longest time an image waits for others to share its batch, in ms."
    )
    max_queued_images: int = Field(
        256, ge=1, description="Images that may wait for the vision tower; beyond it the answer is 503."
    )
    max_queued_mb: float = Field(
        1024,
        ge=1,
        description="Bytes of the image files that may wait for the vision tower, in MB; likewise.",
    )
    preprocess_threads: int = Field(2, ge=1, le=256, description="Threads that decode and preprocess images.")
    lease_timeout_s: Seconds = Field(
        30, description="How long an exported embedding stays pinned for a PD worker that does not READ it."
    )


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
        "used again soon, so that many pictures seen once do not push out those that come back.",
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
        description="Host memory in MB for embeddings in transit that are not cached: all of them with "
        "capacity 0, else those that may not enter the cache or for which it is too full of leased entries.",
    )
    encode_timeout_s: Seconds = Field(
        60,
        description="Deadline for one missing embedding: encode, transfer and the one retry together. The "
        "first encode worker gets half of it where there is another one to ask.",
    )
    encode_breaker_failures: int = Field(
        3,
        ge=1,
        description="Failures in a row after which an encode worker is passed over; refused images and full "
        "queues are none.",
    )
    encode_breaker_retry_s: Seconds = Field(
        1, description="How long such an encode worker is passed over before one request tries it again."
    )
    reject_non_finite_embeddings: bool = Field(
        True, description="Refuse embeddings that hold NaN or infinity, instead of serving and caching them."
    )
    max_concurrent_requests: int = Field(
        1024, ge=1, description="Requests taken at a time; beyond it the answer is 503."
    )
    max_concurrent_fetches: int = Field(
        64,
        ge=1,
        description="http(s) images fetched at a time; further ones wait, at most the media timeout.",
    )
    max_waiting_image_mb: float = Field(
        1024,
        ge=1,
        description="Bytes of image files, in MB, that may wait for an encode worker; beyond it a new image "
        "is answered 503, and cached ones are still served.",
    )
    max_images_per_request: int = Field(32, ge=1, le=4096, description="Most images in one request.")
    allowed_local_media_path: Path | None = Field(
        None, description="Folder below which file: URLs may be read. Not set: file: URLs are refused."
    )
    allow_private_addresses: bool = Field(
        False, description="Let http(s) image URLs lead to private and loopback addresses."
    )
    media_timeout_s: Seconds = Field(30, description="Deadline for fetching one image.")
    http_cache_mb: float = Field(
        64, ge=0, le=65536, description="Memory in MB for fetched http(s) images that may be revalidated."
    )

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model_path).name


class ControlSettings(RuntimeSettings):
    """What the tools share that talk to a running deployment's workers."""

    endpoint: str = Field(DEFAULT_PD_ENDPOINT, description="Dynamo endpoint of the PD workers.")
    encode_endpoint: str = Field(
        DEFAULT_ENCODE_ENDPOINT,
        description="Dynamo endpoint of the encode workers.",
        json_schema_extra={"env": "ENCODE_ENDPOINT"},
    )
    discovery_wait_s: Seconds = Field(2, description="How long to wait for discovery to name a worker.")


class DropSettings(ControlSettings):
    """What to drop."""

    key: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="Drop one embedding, by its key in hex.",
        json_schema_extra={"form": "64 hexadecimal digits in lower case, as the log at DEBUG has them"},
    )
    salt: bool = Field(
        False,
        description="Drop what was stored under one cache_salt, which is read from standard input.",
        json_schema_extra={"switch": True},
    )
    all: bool = Field(False, description="Drop everything.", json_schema_extra={"switch": True})
    wait_s: Seconds = Field(
        10, description="How long to wait for embeddings that are on their way to a PD worker."
    )


class TopSettings(ControlSettings):
    """What to show of a running deployment, and where to find it."""

    url: tuple[str, ...] = Field(
        (),
        description="System port of a worker, as host:port or a whole URL; may be given several times. "
        "Default: every worker that discovery names.",
    )
    interval_s: Seconds = Field(2, description="Time between two scrapes.")
    window_s: Seconds = Field(30, description="Ratios, rates and latencies are those of this long.")
    count: int | None = Field(
        None, ge=1, description="Frames to print. Default: until Ctrl-C on a terminal, one otherwise."
    )
    timeout_s: Seconds = Field(2, description="How long to wait for a worker that does not answer.")


EngineArgs = TypeVar("EngineArgs", bound=BaseModel)


def load_engine_args(path: Path | None, schema: type[EngineArgs]) -> EngineArgs:
    """Read an engine's YAML file into `schema`; no file means the schema's defaults.

    Raises `ConfigurationError` that names the file and the key for an unknown key, a wrong type,
    a repeated key, or a file that is no YAML mapping.
    """
    values: dict[str, Any] = {} if path is None else _read_mapping(path)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, schema) for problem in error.errors())
        raise ConfigurationError(f"{path or 'engine settings'}: {problems}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key}' stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; check --extra-engine-args"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def _describe(problem: Any, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(schema.model_fields))
        return f"unknown key '{key}' (known keys: {known})"
    return f"key '{key}': {problem['msg']}"
