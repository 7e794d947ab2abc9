"""The benches as fixtures of this folder."""

from tests.tiers.bench import bench, folder, redis_server, tier_kind
from tests.unasked import no_error_is_left_to_asyncio

__all__ = ["bench", "folder", "no_error_is_left_to_asyncio", "redis_server", "tier_kind"]
