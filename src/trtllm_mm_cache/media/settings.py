"""What the operator allows media to be and where it may come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from trtllm_mm_cache.config import ImageFormat

MIB = 1024**2


class MediaSettings(BaseModel):
    """Limits and permissions for fetching and decoding media. Sizes in bytes, times in seconds.

    The defaults are safe for a server that strangers can reach: no local files, no private
    addresses, bounded bytes, pixels, time and memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed_local_media_path: Path | None = Field(
        default=None,
        description="Folder below which file: URLs are served, symbolic links resolved. None refuses all.",
    )
    max_file_size_bytes: int = Field(
        default=50 * MIB,
        gt=0,
        description="Most bytes one image may have, as received and after content decoding.",
    )
    allow_private_addresses: bool = Field(
        default=False,
        description=(
            "Let http(s) reach private and loopback addresses, for intranets and tests. Link-local "
            "addresses and the metadata services of cloud providers stay refused."
        ),
    )
    http_connect_timeout: float = Field(
        default=5.0, gt=0, description="Seconds to resolve a media server's name and connect to it."
    )
    http_total_timeout: float = Field(
        default=30.0,
        gt=0,
        description="Seconds for one reference, from the request to its last byte, redirects included.",
    )
    http_max_redirects: int = Field(
        default=3, ge=0, description="Redirects followed for one reference; each hop is checked anew."
    )
    http_max_connections: int = Field(
        default=64, gt=0, description="Connections to media servers at a time; more fetches wait their turn."
    )
    http_cache_bytes: int = Field(
        default=256 * MIB,
        ge=0,
        description="Memory for HTTP response bodies kept for reuse or revalidation. 0 keeps none.",
    )
    max_image_pixels: int = Field(
        default=89_478_485,
        gt=0,
        le=178_956_970,
        description=(
            "Most pixels (width times height) one image may have, checked from its header. The default "
            "is the size at which Pillow warns of a decompression bomb, the highest value that at "
            "which it refuses one."
        ),
    )
    max_image_side: int = Field(
        default=65_535, gt=0, description="Most pixels one side of an image may have (JPEG's own limit)."
    )
    max_image_aspect_ratio: float = Field(
        default=200.0,
        ge=1,
        description=(
            "Most times that the longer side of an image may be the shorter one. A processor that scales "
            "the shorter side to 336 pixels makes 88 GB of floats of an image of 1 x 65,535. The default is "
            "the limit that Qwen's own processor has."
        ),
    )
    image_formats: Annotated[frozenset[ImageFormat], Field(min_length=1)] = Field(
        default=frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"}),
        description="Formats that are decoded. The bytes decide, never a name or a declared type.",
    )
