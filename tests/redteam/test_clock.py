"""The system's clock is set by an hour while requests come: only log lines show it.

libfaketime (Debian's package `faketime`) sets the clock of the processes alone: what they read from a file is
added to the system's time. Monotonic clocks and the times of files are left as they are, as by a real step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.cards import Deal
from tests.redteam.deployment import Deployment, deployed

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime (apt-get install faketime)"),
    pytest.mark.timeout(600),
    pytest.mark.long,  # libfaketime slows every process down
]

WATCHED_S = 14.0
"""Longer than discovery keeps what is not renewed (10 s), and several of its looks (3.3 s)."""


class Clock:
    """The clock of a deployment's processes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.set(0)

    def set(self, offset_s: int) -> None:
        """Set it, so many seconds from the system's."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset_s:+d}\n")
        new.replace(self._file)

    def variables(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@pytest.fixture(scope="module")
def clocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, Clock]]:
    folder = tmp_path_factory.mktemp("clock")
    clock = Clock(folder)
    with deployed(folder, **clock.variables()) as running:
        yield running, clock
    for service in running.services:  # killed processes leave what libfaketime has made for each
        for name in ("faketime_shm", "sem.faketime_sem"):
            Path("/dev/shm", f"{name}_{service.popen.pid}").unlink(missing_ok=True)  # noqa: S108


@pytest.mark.parametrize("step_s", [3600, -3600], ids=["forward", "back"])
def test_a_step_of_the_clock_fails_no_request(
    clocked: tuple[Deployment, Clock], deal: Deal, step_s: int
) -> None:
    deployment, clock = clocked
    hit = deal()
    assert deployment.ask(*hit.parts) == hit.answer
    clock.set(step_s)
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + WATCHED_S
    try:
        while time.monotonic() < end:
            try:
                outcomes["right" if deployment.ask(*hit.parts) == hit.answer else "wrong"] += 1
            except openai.APIStatusError as error:
                outcomes[str(error.status_code)] += 1
    finally:
        clock.set(0)
    print(step_s, outcomes)
    assert set(outcomes) == {"right"}
    assert outcomes["right"] > 10
    miss = deal()
    assert deployment.ask(*miss.parts) == miss.answer
    for service in deployment.services:
        assert "the system's clock was set by" in service.log.read_text(), f"{service.name} saw no step"
