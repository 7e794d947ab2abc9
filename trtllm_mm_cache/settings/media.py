"""What an image may be, and where it may come from."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from trtllm_mm_cache.settings.base import MB, ImageFormat, Seconds, Settings, constant

_PROXY = re.compile(
    r"https?://(?:[^\s/@]+@)?(?:[^\s/@:\[\]?#]+|\[[0-9a-f:.]+\])(?::(?P<port>\d{1,5}))?/?", re.IGNORECASE
)


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
