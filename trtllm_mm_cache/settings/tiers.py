"""Settings of the tiers that outlive a worker: a local disk, and a store that hosts share."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from trtllm_mm_cache.settings.base import GB, Settings


class TierSettings(Settings):
    """Where embeddings are kept besides the arena. With neither a disk nor a store: nowhere."""

    multimodal_embedding_cache_disk_path: Path | None = Field(
        None,
        description="Folder on a local disk for embeddings, which are there again after a restart. Closed to "
        "other users, and of one model: another model's entries are removed. Not set: there is no disk tier.",
    )
    multimodal_embedding_cache_disk_capacity_gb: float = Field(
        10,
        ge=0.001,
        le=1024 * 1024,
        description="Most GB of files in that folder; what was used longest ago leaves first.",
    )
    multimodal_embedding_cache_store_url: SecretStr | None = Field(
        None,
        description="Store that hosts share, over the Redis protocol: redis://host:port/0, or rediss:// "
        "for TLS. Give a password in the variable: every user of the machine can see flags. Not set: none.",
        json_schema_extra={"env": "MM_CACHE_STORE_URL"},
    )
    multimodal_embedding_cache_secret_file: Path | None = Field(
        None,
        description="File with the secret that entries on disk and in the store are sealed with: 32 bytes or "
        "more, closed to other users, the same on all hosts that share a store. Default for a disk alone: "
        "`secret` in its folder, made when it is missing. With a store it must be set.",
        json_schema_extra={"env": "MM_CACHE_ENTRIES_SECRET_FILE"},
    )
    multimodal_embedding_cache_store_at_use: int = Field(
        2,
        ge=1,
        le=1000,
        description="At which use an embedding is written to disk and store: most images are seen once, and "
        "writing those costs more than it brings. 1 writes everything.",
    )
    multimodal_embedding_cache_max_age_hours: float | None = Field(
        None,
        gt=0,
        le=24 * 365 * 10,
        description="Age in hours at which an entry on disk or in the store is removed. Not set: when it has "
        "to make room.",
    )

    @property
    def kept(self) -> bool:
        """Whether there is a tier that keeps embeddings."""
        return not (
            self.multimodal_embedding_cache_disk_path is None
            and self.multimodal_embedding_cache_store_url is None
        )

    @property
    def disk_bytes(self) -> int:
        """Capacity of the disk tier in bytes."""
        return int(self.multimodal_embedding_cache_disk_capacity_gb * GB)

    @property
    def max_age_s(self) -> float | None:
        """The maximum age in seconds."""
        hours = self.multimodal_embedding_cache_max_age_hours
        return None if hours is None else hours * 3600
