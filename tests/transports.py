"""UCX's transports, as NIXL takes them on this host."""

from __future__ import annotations

from pathlib import Path


def over_tcp() -> str:
    """Return the UCX_TLS of TCP alone; with a GPU NIXL wants the transport to its memory beside it."""
    return "tcp,cuda_copy" if Path("/dev/nvidiactl").exists() else "tcp"
