"""The bench of the resolver's tests: real cache, flights and NIXL, peer encode workers."""

from tests.workers.conftest import bench, require_salt

__all__ = ["bench", "require_salt"]
