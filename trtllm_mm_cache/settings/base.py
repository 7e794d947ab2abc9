"""What all settings share: units, names, how a process finds the others and what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

GB = 1024**3
MB = 1024**2

EngineName = Literal["transformers", "trtllm", "vllm", "sglang"]
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
