"""The ways that `transfer.py` compares: which code, which transports, which pages."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import say
from benchmarks.two_hosts import Host

REPOSITORY = Path(__file__).parents[1]
TCP = "tcp,cuda_copy" if Path("/dev/nvidiactl").exists() else "tcp"


@dataclass(frozen=True)
class Way:
    """One way, by the name that `transfer_process` knows it by, with the checkout whose code it runs."""

    end: str
    folder: Path = REPOSITORY
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()

    def command(self, *arguments: str, host: Host | None) -> tuple[str, ...]:
        """Return the words that start one of its ends."""
        host_prefix = () if host is None else host.prefix
        return (*self.prefix, *host_prefix, sys.executable, "-m", "benchmarks.transfer_process", *arguments)

    def variables(self, host: Host | None) -> dict[str, str]:
        """Return the environment of its ends."""
        host_variables = {} if host is None else host.environment
        return {**os.environ, **self.environment, **host_variables, "PYTHONPATH": str(self.folder)}


def ways_of(
    *, two_hosts: bool, before: Path | None, dynamo: tuple[str, ...], large_pages: tuple[str, ...] | None
) -> dict[str, Way]:
    """Return the ways by their names in the results; the first is ours. `large_pages` as `large_pages()`."""
    # Two network namespaces are one machine still, and its arenas could be mapped.
    ways = {} if two_hosts else {"ours": Way("ours")}
    ways["ours_nixl"] = Way("ours_nixl")
    if two_hosts:
        ways["ours_nixl_unchecked"] = Way("ours_unchecked")
    else:
        tcp = {"UCX_TLS": TCP}
        ways["ours_tcp"] = Way("ours_nixl", environment=tcp)
        ways["ours_tcp_unchecked"] = Way("ours_unchecked", environment=tcp)
    if before is not None:
        ways["before"] = Way("ours", folder=before.resolve())
    for end in dynamo:
        if not (two_hosts and end == "local"):
            ways[end] = Way(end)
    if large_pages is not None and not two_hosts:
        ways["ours_large_pages"] = Way("ours", prefix=large_pages)
        ways["ours_nixl_large_pages"] = Way("ours_nixl", prefix=large_pages)
    return ways


@contextlib.contextmanager
def large_pages() -> Iterator[tuple[str, ...] | None]:
    """Yield the words before a command that gives it a `/dev/shm` of its own, of large pages; for root.

    It is a mount in a namespace that a process of ours holds: nobody else sees it, and it ends with that
    process. Yields None, and says so, where it cannot be made.
    """
    mount = "mount -t tmpfs -o huge=always,mode=1777 tmpfs /dev/shm && echo ready && exec cat"
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        say("large pages need root, `unshare` and `nsenter`: left out")
        yield None
        return
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:  # closes its stdin at the end, and waits for it
        if holder.stdout is None or holder.stdout.readline().strip() != "ready":
            say("this kernel mounts no /dev/shm of large pages: left out")
            yield None
            return
        yield ("nsenter", "--target", str(holder.pid), "--mount", "--")
