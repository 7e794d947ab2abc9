"""Puts the parts of a PD worker's way of images together, from its settings."""

from __future__ import annotations

from contextlib import suppress

from trtllm_mm_cache.engines.base import Generator
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import MediaSettings, MediaSource
from trtllm_mm_cache.pd.memory import PdMemory
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.runtime.encode_client import EncodeClient
from trtllm_mm_cache.runtime.media_limits import image_limits
from trtllm_mm_cache.runtime.messages import EncodeReady
from trtllm_mm_cache.settings import MB, PdSettings
from trtllm_mm_cache.tiers.breaker import CircuitBreakers
from trtllm_mm_cache.tiers.loader import EmbeddingLoader
from trtllm_mm_cache.transfer import PeerMetadata, Reader


def make_resolver(
    settings: PdSettings,
    memory: PdMemory,
    encode_client: EncodeClient,
    generator: Generator,
    metrics: PdMetrics,
) -> ItemResolver:
    """Return a resolver of images for `generator`."""
    media_settings = _media_settings(settings)
    loader = EmbeddingLoader(
        cache=memory.cache,
        transit=memory.transit,
        encoders=encode_client,
        breakers=CircuitBreakers(
            failures=settings.encode_breaker_failures, retry_s=settings.encode_breaker_retry_s
        ),
        reader=memory.reader,
        fingerprint=generator.fingerprint,
        check=generator.check_embedding,
        reject_non_finite=settings.reject_non_finite_embeddings,
        encode_timeout_s=settings.encode_timeout_s,
        transfer_timeout_s=settings.transfer_timeout_s,
        metrics=metrics,
        what_if=memory.what_if,
    )
    return ItemResolver(
        source=MediaSource(media_settings),
        media_settings=media_settings,
        cache=memory.cache,
        loader=loader,
        fingerprint=generator.fingerprint,
        max_fetches=settings.max_concurrent_fetches,
        fetch_wait_s=settings.media_timeout_s,
        max_waiting_bytes=int(settings.max_waiting_image_mb * MB),
        metrics=metrics,
        require_salt=settings.multimodal_embedding_cache_require_salt,
        what_if=memory.what_if,
    )


def give_up(reader: Reader, ready: EncodeReady) -> None:
    """Have the export of an answer that nobody waits for any more released."""
    with suppress(MmCacheError):  # metadata that arrived damaged: its lease times out
        reader.give_up(PeerMetadata.from_wire(ready.peer), ready.token)


def _media_settings(settings: PdSettings) -> MediaSettings:
    return MediaSettings(
        allowed_local_media_path=settings.allowed_local_media_path,
        allow_private_addresses=settings.allow_private_addresses,
        http_total_timeout=settings.media_timeout_s,
        http_cache_bytes=int(settings.http_cache_mb * MB),
        **image_limits(settings),
    )
