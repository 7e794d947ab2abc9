"""Settings of the frontend."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trtllm_mm_cache.settings.base import DEFAULT_PD_ENDPOINT, RuntimeSettings, Seconds, constant


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
        "received, decoded, and on its way to a PD worker. Large ones wait for their turn, then get 503; a "
        "quarter is for small ones (64 KiB at most), which never wait.",
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
