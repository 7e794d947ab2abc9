"""Whether arenas fit: /dev/shm, the memory limits of the control groups, and the machine's memory.

What is beyond the last two is not refused by any call: the kernel kills a process, at the moment that touches
the page too much. So the figures are compared before anything is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT, remove_leftovers
from trtllm_mm_cache.errors import ConfigurationError, SharedMemoryError

_CGROUPS = Path("/sys/fs/cgroup")
_GIB = 1024**3


@dataclass(frozen=True)
class Room:
    """Bytes that one limit leaves, what it is called, and how it is raised."""

    free_bytes: int
    what: str
    way_out: str


def check_fits(arenas: Mapping[str, int]) -> None:
    """Raise `ConfigurationError` with the figures unless all `arenas` (bytes by their setting's name) fit.

    Removes what dead processes left in /dev/shm first. Reads some files: milliseconds. Another process may
    take the memory afterwards.
    """
    remove_leftovers()
    needed = sum(arenas.values())
    tightest = min(_rooms(), key=lambda room: room.free_bytes)
    if needed <= tightest.free_bytes:
        return
    parts = ", ".join(f"{_gib(nbytes)} by {name}" for name, nbytes in arenas.items() if nbytes)
    error = SharedMemoryError if tightest.what.startswith("shared memory") else ConfigurationError
    raise error(
        f"the arenas need {_gib(needed)} ({parts}), but {_gib(tightest.free_bytes)} are free of "
        f"{tightest.what}: lower one of these settings, or {tightest.way_out}"
    )


def _rooms() -> Iterator[Room]:
    yield _shared_memory()
    yield Room(psutil.virtual_memory().available, "this machine's memory", "end other programs")
    for nbytes, group in cgroup_rooms(_CGROUPS, Path("/proc/self/cgroup").read_text()):
        yield Room(
            nbytes,
            f"the memory limit of the control group {group}",
            "raise that limit (docker run --memory=..., in Kubernetes resources.limits.memory)",
        )


def _shared_memory() -> Room:
    try:
        status = os.statvfs(SHARED_MEMORY_ROOT)
    except OSError as error:
        raise SharedMemoryError(
            f"there is no shared-memory file system at {SHARED_MEMORY_ROOT}: {error.strerror}"
        ) from error
    return Room(
        status.f_bavail * status.f_frsize,
        f"shared memory ({SHARED_MEMORY_ROOT})",
        "give it more (docker run --shm-size=..., in Kubernetes an emptyDir with medium: Memory mounted at "
        "/dev/shm, on a host mount -o remount,size=... /dev/shm)",
    )


def cgroup_rooms(root: Path, membership: str) -> Iterator[tuple[int, str]]:
    """Yield what each memory limit of this process's control groups leaves, in bytes, and the group's name.

    `root` is where they are mounted, `membership` the text of /proc/self/cgroup. Both versions; a group that
    cannot be seen from here (a container without a namespace of its own) counts as the root of the mount,
    which is then its own.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(root, path, ("memory.max", "memory.current", ("inactive_file", "active_file")))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            yield from _limits(root / "memory", path, (*names, ("total_inactive_file", "total_active_file")))


def _limits(mount: Path, path: str, names: tuple[str, str, tuple[str, ...]]) -> Iterator[tuple[int, str]]:
    """Yield what the limits of the group at `path` and of every group above it leave."""
    limit_name, usage_name, caches = names
    own = PurePosixPath(path)
    for group in dict.fromkeys((own, *own.parents)):
        folder = mount / group.relative_to("/")
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the root has none, and a container sees its own alone
        if limit != "max":
            # Cached files are given back for the asking. Without a limit version 1 has a number near 2**63.
            reclaimable = sum(int(statistics.get(name, 0)) for name in caches)
            yield max(int(limit) - usage + reclaimable, 0), str(group)


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GB"
