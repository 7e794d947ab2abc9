"""The benches as fixtures of this folder."""

from tests.tiers.bench import bench, folder, redis_server, tier_kind

__all__ = ["bench", "folder", "redis_server", "tier_kind"]
