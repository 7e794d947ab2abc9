"""systemd reads the example unit without a complaint, and what an instance starts has the flags."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.containers import check_command

FOLDER = Path(__file__).resolve().parents[2] / "deploy/systemd"
UNIT = FOLDER / "mm-cache@.service"
PROGRAM = "/opt/trtllm-mm-cache/.venv/bin/trtllm-mm-cache"
INSTANCES = sorted(path.stem for path in FOLDER.glob("*.env") if path.stem != "common")


def variables(instance: str) -> dict[str, str]:
    """Return what systemd reads from the instance's file."""
    lines = (FOLDER / f"{instance}.env").read_text().splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines if line[:1] not in "#")}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (package systemd)")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False
    )
    # It reads the machine's own units too.
    assert not [line for line in done.stderr.splitlines() if UNIT.name in line]


@pytest.mark.parametrize("instance", INSTANCES)
def test_the_role_of_an_instance_takes_its_options(instance: str) -> None:
    given = variables(instance)
    check_command([given["ROLE"], *given["OPTIONS"].split()])


def test_what_an_instance_needs_is_in_the_examples() -> None:
    assert set(INSTANCES) == {"encode-1", "frontend", "pd"}
    common = variables("common")
    assert common["MM_CACHE_SECRET_FILE"] == "/etc/mm-cache/secret"
    workers = [variables(instance) for instance in INSTANCES if instance != "frontend"]
    assert len({each["DYN_SYSTEM_PORT"] for each in workers}) == len(workers), "one host, one port each"
