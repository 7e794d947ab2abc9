"""From a reference in a request to a validated image."""

from trtllm_mm_cache.media.image import ImageInfo, decode_image, pixels_fingerprint, probe_image
from trtllm_mm_cache.media.source import MediaSource

__all__ = ["ImageInfo", "MediaSource", "decode_image", "pixels_fingerprint", "probe_image"]
