"""Tiers under chaos: a disk folder of both PD workers, and a store; each is disturbed as the workers are."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.stack import free_port
from tests.services import WITH_US, Service

_FROZEN_S = 1.5


class ChaosTiers:
    """The folder and the store. `step` disturbs them now and then; `faults` counts what was done."""

    def __init__(self, folder: Path, rng: random.Random, pause_s: float) -> None:
        self.disk = folder / "disk"
        self._rng, self._pause_s = rng, pause_s
        self._secret = folder / "entries-secret"
        self._secret.write_text("s" * 64)
        self._secret.chmod(0o600)
        self._port = free_port()
        server = ("redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--save", "")
        limits = ("--dir", str(folder), "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru")
        self.store = Service("store", (*WITH_US, *server, *limits), folder, "Ready to accept connections")
        self._frozen_until: float | None = None
        self._next = time.monotonic()
        self.faults: Counter[str] = Counter()

    @property
    def options(self) -> tuple[str, ...]:
        """What a PD worker is started with."""
        return (
            *("--multimodal-embedding-cache-disk-path", str(self.disk)),
            *("--multimodal-embedding-cache-disk-capacity-gb", "0.002"),
            *("--multimodal-embedding-cache-store-url", f"redis://127.0.0.1:{self._port}"),
            *("--multimodal-embedding-cache-secret-file", str(self._secret)),
        )

    def step(self) -> None:
        """Freeze, kill or restart the store, or damage an entry on disk, if it is time."""
        now = time.monotonic()
        if self._frozen_until is not None and now >= self._frozen_until:
            self.store.signal(signal.SIGCONT)
            self._frozen_until = None
        if now < self._next:
            return
        self._next = now + self._rng.expovariate(1 / self._pause_s)
        on_disk = ("_damage", "_remove") if any(self._entries()) else ()
        getattr(self, self._rng.choice(("_freeze", "_restart", *on_disk)))()

    def end(self) -> None:
        """Let the store go on, if it is frozen."""
        if self._frozen_until is not None:
            self.store.signal(signal.SIGCONT)

    def _freeze(self) -> None:
        if self._frozen_until is None:
            self.faults["store frozen"] += 1
            self.store.signal(signal.SIGSTOP)
            self._frozen_until = time.monotonic() + _FROZEN_S

    def _restart(self) -> None:
        if self._frozen_until is None:
            self.faults["store killed"] += 1
            self.store.kill()
            self.store.start()

    def _damage(self) -> None:
        for path in self._some_entry():
            data = bytearray(path.read_bytes())
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            path.write_bytes(data)
            self.faults["entry damaged"] += 1

    def _remove(self) -> None:
        for path in self._some_entry():
            path.unlink()
            self.faults["entry removed"] += 1

    def _some_entry(self) -> Iterator[Path]:
        """Yield an entry, if there is one; it may be evicted at any moment."""
        paths = self._entries()
        try:
            yield from self._rng.sample(paths, min(1, len(paths)))
        except FileNotFoundError:
            return

    def _entries(self) -> list[Path]:
        return [path for path in self.disk.rglob("*") if len(path.name) == 64]


@contextmanager
def chaos_tiers(folder: Path, rng: random.Random, pause_s: float) -> Iterator[ChaosTiers]:
    """Start the store; kill it in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    tiers = ChaosTiers(folder, rng, pause_s)
    tiers.store.start()
    try:
        tiers.store.wait_ready()
        yield tiers
    finally:
        tiers.store.kill()
