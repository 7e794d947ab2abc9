"""Settings of the commands that ask a running deployment, and of the one that plans it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field

from trtllm_mm_cache.settings.base import (
    DEFAULT_ENCODE_ENDPOINT,
    DEFAULT_PD_ENDPOINT,
    DiscoverySettings,
    EngineName,
    Seconds,
    Settings,
    constant,
)


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
    disk_gb: float | None = Field(
        None,
        gt=0,
        le=1024 * 1024,
        description="Say too what a disk of this many GB would bring below that memory.",
    )
    zipf: float = constant(
        0.9,
        "With --hit and --disk-gb: how unequal popularity is, Zipf's exponent of web traffic.",
        ge=0,
        le=3,
    )
    engine: EngineName = Field("transformers", description="Engine of the workers.")
    extra_engine_args: Path | None = Field(
        None, description="The encode worker's engine YAML file: it may name the dtype."
    )
