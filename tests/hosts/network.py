"""Two hosts on one machine: network namespaces, joined by a cable (a veth pair).

Nothing of it has a name on the machine, so nothing can collide or stay behind: a namespace lives as long as
a process is in it, the kernel kills those with the test's own process, and the cable goes with its ends.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.e2e.stack import wait_until
from tests.services import WITH_US

T = TypeVar("T")

INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000
_PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv")


@functools.cache
def reason_to_skip(*more_programs: str) -> str | None:
    """Return why this machine cannot be two hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts need network namespaces: Linux, as root"
    # Not on every PATH, and root's tools are there.
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    missing = [program for program in (*_PROGRAMS, *more_programs) if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install etcd-server iproute2)"
    probe = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, text=True)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class Host:
    """A network namespace with the `address` at its end of the cable. Close it to end what runs inside."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._holder = subprocess.Popen([*WITH_US, "unshare", "--net", "sleep", "infinity"])
        outside = os.readlink("/proc/self/ns/net")
        wait_until(lambda: self._namespace() not in (None, outside), 10, "no network namespace")
        self._threads = ThreadPoolExecutor(32, initializer=self._enter)

    def command(self, *command: str) -> tuple[str, ...]:
        """Return the command that runs `command` here; it ends with the test's process."""
        return ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--", *WITH_US, *command)

    def run(self, *command: str) -> None:
        """Run a command here to its end; fails with its output."""
        done = subprocess.run(self.command(*command), check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` in a thread whose new sockets belong to this host."""
        return self._threads.submit(work)

    def do(self, work: Callable[[], T]) -> T:
        """Call `work` in such a thread and return what it does."""
        return self.begin(work).result()

    def received_bytes(self) -> int:
        """Return how many bytes have come through the cable."""
        for line in Path(f"/proc/{self._holder.pid}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == INTERFACE:
                return int(counts.split()[0])
        raise LookupError("the host has no cable")

    def close(self) -> None:
        """Let go of the namespace; it goes when the processes inside have ended."""
        self._threads.shutdown()
        self._holder.kill()
        self._holder.wait()

    @property
    def pid(self) -> int:
        """A process inside, as `ip` wants to be told of the namespace."""
        return self._holder.pid

    def _namespace(self) -> str | None:
        try:
            return os.readlink(f"/proc/{self._holder.pid}/ns/net")
        except OSError:
            return None

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = os.open(f"/proc/{self._holder.pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(namespace, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(namespace)


class Cable:
    """What joins two hosts; it can be cut, mended and made slow."""

    def __init__(self, one: Host, other: Host) -> None:
        self._ends = one, other
        one.run(*f"ip link add {INTERFACE} type veth peer name {INTERFACE} netns {other.pid}".split())
        for host in self._ends:
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", INTERFACE, "up")

    def cut(self) -> None:
        """Take the link down: packets are lost, and nobody is told of it."""
        self._ends[1].run("ip", "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Take the link up again."""
        self._ends[1].run("ip", "link", "set", INTERFACE, "up")

    @contextmanager
    def slow(self, kilobits: int) -> Iterator[None]:
        """Let at most so many kilobits a second through, from the second host to the first."""
        host = self._ends[1]
        limit = f"rate {kilobits}kbit burst 8kb latency 10s"
        host.run(*f"tc qdisc add dev {INTERFACE} root tbf {limit}".split())
        try:
            yield
        finally:
            host.run(*f"tc qdisc del dev {INTERFACE} root".split())


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Cable]]:
    """Make two hosts and the cable between them."""
    hosts = Host("10.77.0.1"), Host("10.77.0.2")
    try:
        yield *hosts, Cable(*hosts)
    finally:
        for host in hosts:
            host.close()
