"""The writer is killed at any point: nothing torn is served, and nothing that was acknowledged is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers.bench import FINGERPRINT, SECRET
from tests.tiers.killed_writer import CAPACITY, entry
from trtllm_mm_cache.tiers.disk import DiskStorage
from trtllm_mm_cache.tiers.format import HEADER_BYTES, EntryName, Sealer


@pytest.mark.parametrize("kills", [25, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "renamed"])
def test_killed_writers(folder: Path, kills: int, unnamed: bool) -> None:
    command = [sys.executable, "-m", "tests.tiers.killed_writer", str(folder), str(kills), "7"]
    if not unnamed:  # as on a file system that has none, such as NFS
        command[1:3] = [
            "-c",
            "import os; os.O_TMPFILE = os.O_DIRECTORY; from tests.tiers.killed_writer import main; main()",
        ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    *acknowledged, inside = ended.stdout.split("\n")[:-1]
    assert int(inside.split()[1]) >= kills / 3, "most kills are to fall into a store"

    storage, sealer = DiskStorage(folder, FINGERPRINT, CAPACITY), Sealer(SECRET)
    there = {path.name for path in folder.rglob("*") if len(path.name) == 64}
    assert set(acknowledged) <= there
    for key in there:
        found = storage.look_up(EntryName(key))
        assert found is not None
        header = sealer.open(found.header, key)
        _, _, expected = entry(int(key, 16))
        payload = bytearray(header.nbytes)
        assert found.read(memoryview(payload), HEADER_BYTES) == len(expected)
        assert payload == expected
        assert found.size == HEADER_BYTES + len(expected)
        found.close()
    storage.tidy(lambda data, key: None)
    assert storage.contents().entries == len(there)
    assert list(folder.rglob(".tmp*")) == []
    storage.close()
