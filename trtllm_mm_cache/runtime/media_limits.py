"""The limits on images that both workers keep, from the settings that both have.

The PD worker reads headers, the encode worker decodes: started with the same flags they refuse the same.
"""

from __future__ import annotations

from typing import Any

from trtllm_mm_cache.settings import MB, EngineSettings


def image_limits(settings: EngineSettings) -> dict[str, Any]:
    """Return the arguments of `MediaSettings` that say what an image may be."""
    return {
        "max_file_size_bytes": int(settings.max_file_size_mb * MB),
        "max_image_pixels": int(settings.max_image_megapixels * 1e6),
        "max_image_side": settings.max_image_side,
        "max_image_aspect_ratio": settings.max_image_aspect_ratio,
        "image_formats": frozenset(settings.image_formats),
    }
