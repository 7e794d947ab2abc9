"""Two network namespaces with a cable between them: two hosts on one machine, for root."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """One of the two. A process of it is started with `prefix` before its command and `environment` added.

    UCX has to be told to use TCP: it would find by itself that both are on one machine, and copy past the
    network.
    """

    namespace: str
    device: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words before a command."""
        return ("ip", "netns", "exec", self.namespace)

    @property
    def environment(self) -> dict[str, str]:
        """What makes UCX use the cable."""
        return {
            "UCX_TLS": "tcp,cuda_copy" if Path("/dev/nvidiactl").exists() else "tcp",
            "UCX_NET_DEVICES": self.device,
        }


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make the namespaces and remove them, with what is in them, at the end.

    Names are new ones each time. Raises `SystemExit` where it cannot be done: not root, or no `ip`.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("two network namespaces need root and the `ip` command of iproute2")
    name = f"mm{secrets.token_hex(4)}"  # a device's name has at most 15 characters
    hosts = tuple(Host(f"{name}{side}", f"{name}{side}0") for side in "ab")
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip("link", "add", hosts[0].device, "type", "veth", "peer", "name", hosts[1].device)
        for number, host in enumerate(hosts, start=1):
            _ip("link", "set", host.device, "netns", host.namespace)
            inside = ("-n", host.namespace)
            _ip(*inside, "address", "add", f"10.213.7.{number}/24", "dev", host.device)
            _ip(*inside, "link", "set", host.device, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:  # the cable goes with either end
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
