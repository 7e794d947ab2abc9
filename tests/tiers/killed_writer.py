"""Writers that are killed in the middle: `python -m tests.tiers.killed_writer FOLDER KILLS SEED`.

A small process forks writers, each of which stores entries as fast as it can and says after each that it has;
each is killed by SIGKILL some microseconds to milliseconds later. Imported before the forks is no more than
the storage needs. Prints the names of the entries that were acknowledged, one a line, and how many kills fell
between the beginning and the end of a `store`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.tiers.bench import FINGERPRINT, SECRET
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.tiers.disk import DiskStorage
from trtllm_mm_cache.tiers.format import EntryName, Header, Sealer

PAYLOAD = random.Random(0).randbytes(256 * 1024)
CAPACITY = 16 * 1024**3  # nothing is to be evicted
BEGUN, ENDED = b"b", b"e"


def entry(number: int) -> tuple[EntryName, bytes, bytes]:
    """The `number`-th entry: name, header, payload. Payloads differ in their first bytes."""
    sealer, name = Sealer(SECRET), EntryName(f"{number:064x}")
    payload = number.to_bytes(8, "big") + PAYLOAD
    header = sealer.seal(
        Header(
            *("image", name.key, FINGERPRINT, None, None, len(payload), "uint8", (1, len(payload))),
            metadata=EmbeddingMetadata(),
            made_at=time.time(),
            payload_seal=sealer.payload_seal(payload),
        )
    )
    assert header is not None
    return name, header, payload


def write(folder: Path, numbers: range, told: int) -> None:
    """Store entries until killed; say when each begins and has ended."""
    storage = DiskStorage(folder, FINGERPRINT, CAPACITY)
    storage.tidy(lambda data, key: None)
    assert storage.writes
    for number in numbers:
        name, header, payload = entry(number)
        os.write(told, BEGUN)
        storage.store(name, header, memoryview(payload))
        os.write(told, ENDED)


def main() -> None:
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    inside = 0
    for kill in range(kills):
        numbers = range(kill * 1000, kill * 1000 + 1000)
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            write(folder, numbers, told)
            os._exit(0)
        os.close(told)
        said = os.read(heard, 1)  # the first entry has begun
        time.sleep(rng.expovariate(1 / 0.003))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while piece := os.read(heard, 4096):
            said += piece
        os.close(heard)
        inside += said.endswith(BEGUN)
        for number in numbers[: said.count(ENDED)]:
            print(f"{number:064x}")
    print(f"inside {inside}")


if __name__ == "__main__":
    main()
