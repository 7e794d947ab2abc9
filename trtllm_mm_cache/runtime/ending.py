"""The end of a worker's memory: its books are looked at once more before the arena goes."""

from __future__ import annotations

import logging

from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import IntegrityError

logger = logging.getLogger(__name__)


def close_arena(manager: MultimodalEmbeddingCacheManager, name: str) -> None:
    """Close `manager`, and log whether its books agree and what is still held.

    A worker that has drained holds nothing but the extents of READs that have not settled: anything else
    that the log names here was leaked.
    """
    try:
        manager.check_integrity()
    except IntegrityError:
        logger.exception("%s: the books do not agree at the end", name)
    else:
        held = manager.statistics()
        logger.info(
            "%s: the books agree at the end; bytes held: leased %d, reserved %d, quarantined %d",
            name,
            held.leased_bytes + held.withdrawn_bytes,
            held.reserved_bytes,
            held.quarantined_bytes,
        )
    manager.close()
