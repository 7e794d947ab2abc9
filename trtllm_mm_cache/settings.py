"""Settings of every role, as frozen pydantic models: one class a role, limits nested in it.

Each default is written here and nowhere else. A field is one command-line flag (`trtllm-mm-cache ROLE
--help` shows the descriptions below), wherever it is nested, and where Dynamo has a name for it, bears
Dynamo's name; `constant` marks values that are settings for the code and its tests, but that no operator
would change: they have no flag, and a reason instead. Engine settings are not here: they live in the YAML
file that `--extra-engine-args` names and belong to the engine.

Units: GB = 1024**3 bytes, MB = 1024**2 bytes, times in seconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from trtllm_mm_cache.flags import flag

GB = 1024**3
MB = 1024**2

EngineName = Literal["transformers", "trtllm"]
EvictionPolicyName = Literal["lru", "s3fifo"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]

DEFAULT_NAMESPACE = "dynamo"
DEFAULT_PD_ENDPOINT = f"dyn://{DEFAULT_NAMESPACE}.pd.generate"
DEFAULT_ENCODE_ENDPOINT = f"dyn://{DEFAULT_NAMESPACE}.encode.encode"

_PROXY = re.compile(
    r"https?://(?:[^\s/@]+@)?(?:[^\s/@:\[\]?#]+|\[[0-9a-f:.]+\])(?::(?P<port>\d{1,5}))?/?", re.IGNORECASE
)

Seconds = Annotated[float, Field(gt=0, le=3600)]


def constant(value: Any, reason: str, **bounds: Any) -> Any:
    """Return a field without a flag: `value`, and the reason why no operator would set another."""
    return Field(value, description=reason, json_schema_extra={"constant": True}, **bounds)


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown name is an error."""

    # Errors without the input: it may be a password.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


class DiscoverySettings(Settings):
    """How a process finds the others."""

    discovery_backend: Literal["file", "etcd", "kubernetes", "mem"] = Field(
        "file",
        description="Where processes find each other: `file` on one machine (folder DYN_FILE_KV), "
        "`etcd` (ETCD_ENDPOINTS) or `kubernetes` in a cluster.",
        json_schema_extra={"env": "DYN_DISCOVERY_BACKEND"},
    )
    secret_file: Path | None = Field(
        None,
        description="File with the secret by which the processes of a deployment know each other: 32 bytes "
        "or more, closed to other users. Default with `file` discovery: `secret` in the folder DYN_FILE_KV, "
        "made by the first process. With etcd or Kubernetes it must be set.",
        json_schema_extra={"env": "MM_CACHE_SECRET_FILE"},
    )


class RuntimeSettings(DiscoverySettings):
    """What every process that serves has: discovery, and what it logs."""

    log_level: LogLevel = Field("INFO", description="Least severe log line to print.")
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Form of the log lines: `text`, or `json` for one object a line.",
        json_schema_extra={"env": "MM_CACHE_LOG_FORMAT"},
    )


class FrontendOptions(RuntimeSettings):
    """What is set of a frontend whatever its model."""

    http_host: str = Field(
        "127.0.0.1", description="Address to listen on.", json_schema_extra={"env": "DYN_HTTP_HOST"}
    )
    http_port: int = Field(
        8000, ge=1, le=65535, description="Port to listen on.", json_schema_extra={"env": "DYN_HTTP_PORT"}
    )
    max_request_mb: float = Field(
        128, gt=0, le=1024, description="Largest request body in MB: its data: URLs and its text together."
    )
    request_memory_mb: float = Field(
        1024,
        ge=1,
        description="Memory in MB that the bodies under way may take together. A body counts three times: as "
        "received, decoded, and on its way to a PD worker. Large ones wait for their turn, then get 503.",
    )
    max_waiting_s: Seconds = constant(10, "A large body's turn: what clients wait for before they retry.")
    body_timeout_s: Seconds = constant(60, "To receive a body once it is its turn: 128 MB at 17 Mbit/s.")
    header_timeout_s: Seconds = constant(
        15, "A connection on which no request arrives is closed: strangers must not hold them all.", le=600
    )
    max_connections: int = constant(4096, "Connections at a time; beyond it the answer is 503.", ge=1)


class FrontendSettings(FrontendOptions):
    """The OpenAI-compatible HTTP server, for one model."""

    model_path: str = Field(
        description="Model directory, or a name on the Hugging Face hub: its tokenizer and chat template."
    )
    served_model_name: str | None = Field(
        None, description="Model name that clients use. Default: the last part of --model-path."
    )
    pd_endpoint: str = Field(DEFAULT_PD_ENDPOINT, description="Dynamo endpoint of the PD workers.")
    max_images_per_request: int = Field(32, ge=1, le=4096, description="Most images in one request.")

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model_path).name


class ImageLimits(Settings):
    """What one image may be, and what its transparent pixels show.

    The PD worker reads headers, the encode worker decodes: with equal flags both refuse the same images,
    whatever their names or declared types say. The background must be equal: it decides embeddings, so it
    is part of their keys, and workers that differ in it refuse each other.
    """

    max_file_size_mb: float = Field(
        50, gt=0, le=1024, description="Largest image file accepted, in MB of encoded bytes."
    )
    max_image_megapixels: float = Field(
        89.4,
        gt=0,
        le=178.9,
        description="Largest image accepted, in millions of pixels, checked before decoding.",
    )
    transparent_background: str = Field(
        "ffffff",
        pattern="^([0-9A-Fa-f]{6}|none)$",
        description="Colour behind transparent pixels, as RRGGBB: white by default, as vLLM and TensorRT-LLM "
        "have it. `none` drops transparency, as SGLang and transformers do: a transparent pixel then has the "
        "colour that its file happens to give it, mostly black. Equal on both kinds of worker.",
        json_schema_extra={"form": "six hexadecimal digits, as ffffff for white, or none"},
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

    @property
    def background(self) -> tuple[int, int, int] | None:
        """`transparent_background` as red, green, blue from 0 to 255; None drops transparency."""
        if self.transparent_background == "none":
            return None
        red, green, blue = bytes.fromhex(self.transparent_background)
        return red, green, blue


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
    media_proxy: SecretStr | None = Field(
        None,
        description="Proxy for http(s) image URLs, as http://user:password@host:port, or https. With "
        "it nothing is fetched directly, and where a name leads is the proxy's to judge. Give a password in "
        "the variable: every user of the machine can see flags. HTTP_PROXY and the like are not looked at.",
        json_schema_extra={"env": "MM_CACHE_MEDIA_PROXY"},
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

    @field_validator("media_proxy")
    @classmethod
    def _is_a_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        """Refuse what names no proxy, without repeating it: it may hold a password."""
        found = None if value is None else _PROXY.fullmatch(value.get_secret_value())
        if value is not None and (found is None or not 0 < int(found["port"] or 80) < 65536):
            raise ValueError(
                "must be http://host:port or https://host:port, with user:password@ before the host"
            )
        return value


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
        "transformers", description="Engine that runs the model: `trtllm` on GPUs, `transformers` anywhere."
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
        """Sizes in bytes of cache and transit arena, by the flags that set them."""
        return {
            flag("multimodal_embedding_cache_capacity_gb"): int(
                self.multimodal_embedding_cache_capacity_gb * GB
            ),
            flag("transfer_arena_mb"): int(self.transfer_arena_mb * MB),
        }


class PdSettings(PdOptions, EngineSettings):
    """The prefill+decode worker."""

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or Path(self.model_path).name


class ServeSettings(FrontendOptions, PdOptions):
    """A whole stack on this machine: frontend, encode workers and PD workers, with the options of all.

    What processes must agree on counts for all of them.
    """

    model_path: str | None = Field(
        None,
        description="Model directory, or a name on the Hugging Face hub. Default: the demo model, which "
        "knows drawn cards alone; with TensorRT-LLM llava-hf/llava-v1.6-mistral-7b-hf.",
        json_schema_extra={"env": "MODEL_PATH"},
    )
    engine: EngineName | None = Field(
        None,
        description="Engine that runs the model. Default: `trtllm` where it and a GPU are there, else "
        "`transformers`.",
        json_schema_extra={"env": "ENGINE"},
    )
    extra_engine_args: Path | None = Field(
        None,
        description="YAML file with the PD engine's own settings. Default: configs/MODEL/pd.yaml.",
        json_schema_extra={"env": "PD_ENGINE_ARGS"},
    )
    encode_engine_args: Path | None = Field(
        None,
        description="The same for the encode engine. Default: configs/MODEL/encode.yaml.",
        json_schema_extra={"env": "ENCODE_ENGINE_ARGS"},
    )
    encode_extra_args: str = Field(
        "",
        description="More options for the encode workers (`trtllm-mm-cache encode --help`), in one text.",
        json_schema_extra={"env": "ENCODE_EXTRA_ARGS"},
    )
    encode_workers: int = Field(
        1, ge=0, le=64, description="How many encode workers.", json_schema_extra={"env": "ENCODE_WORKERS"}
    )
    pd_workers: int = Field(
        1, ge=1, le=64, description="How many PD workers.", json_schema_extra={"env": "PD_WORKERS"}
    )
    pd_ranks: int = Field(
        1,
        ge=1,
        le=1024,
        description="Ranks of each PD worker, started by mpirun.",
        json_schema_extra={"env": "PD_RANKS"},
    )
    encode_cuda_visible_devices: str | None = Field(
        None,
        description="GPUs of the encode workers, as in CUDA_VISIBLE_DEVICES. Default: all.",
        json_schema_extra={"env": "ENCODE_CUDA_VISIBLE_DEVICES"},
    )
    pd_cuda_visible_devices: str | None = Field(
        None,
        description="GPUs of the PD workers.",
        json_schema_extra={"env": "PD_CUDA_VISIBLE_DEVICES"},
    )
    run_dir: Path | None = Field(
        None,
        description="Folder for logs, discovery and the secret that the processes share, closed to other "
        "users. Default: .run/TIME-PID.",
        json_schema_extra={"env": "RUN_DIR"},
    )
    drain_timeout_s: Seconds = Field(
        60,
        description="How long each kind of process may take, on SIGTERM or Ctrl-C, to finish what runs.",
        json_schema_extra={"env": "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"},
    )
    no_restart: bool = Field(
        False,
        description="Leave a worker that has ended by itself ended, for tests: everything ends with the "
        "frontend or the last PD worker.",
        json_schema_extra={"env": "MM_CACHE_NO_RESTART"},
    )
    ready_timeout_s: Seconds = constant(
        900, "Downloading a large model, and loading it from a slow disk, take minutes; the log shows a hang."
    )
    restart_most_s: Seconds = constant(30, "Longest wait before a process that keeps ending is tried again.")
    restart_attempts: int = constant(
        5, "Starts in a row that may fail before it is given up: by then it is not chance.", ge=1
    )
    settled_s: Seconds = constant(10, "What served for this long is started again at once when it ends.")


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

    url: str | None = Field(
        None,
        description="Base URL of the server, with or without /v1. Default: this machine, at --http-port.",
        json_schema_extra={"env": "OPENAI_BASE_URL"},
    )
    http_port: int = Field(
        8000,
        ge=1,
        le=65535,
        description="Port of a server on this machine.",
        json_schema_extra={"env": "DYN_HTTP_PORT"},
    )
    model: str | None = Field(None, description="Model name. Default: the first one the server lists.")
    max_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
    temperature: float = constant(0, "Greedy, so that the same question gets the same answer.", ge=0, le=2)
    timeout_s: Seconds = constant(120, "How long to wait for the whole answer: minutes, on a CPU.")

    @property
    def base_url(self) -> str:
        """Where the API is: `url`, with /v1 where it has no path."""
        url = (self.url or f"http://127.0.0.1:{self.http_port}").rstrip("/")
        if "://" not in url:
            url = f"http://{url}"
        return url if urlsplit(url).path else f"{url}/v1"


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
