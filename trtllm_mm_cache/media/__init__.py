"""From a reference in a request to a validated image."""

from trtllm_mm_cache.media.image import ImageInfo, decode_image, probe_image
from trtllm_mm_cache.media.source import MediaSource
from trtllm_mm_cache.settings import MediaSettings

__all__ = ["ImageInfo", "MediaSettings", "MediaSource", "decode_image", "probe_image"]
