"""The example unit is one that systemd reads without a complaint, and what it starts could be typed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.programs import problem_of
from tests.docs.shell import parse

FOLDER = Path(__file__).resolve().parents[2] / "deploy/systemd"
UNIT = FOLDER / "mm-cache@.service"
PROGRAM = "/opt/trtllm-mm-cache/.venv/bin/trtllm-mm-cache"
INSTANCES = sorted(path.stem for path in FOLDER.glob("*.env") if path.stem != "common")


def variables(instance: str) -> dict[str, str]:
    """Return what systemd reads from the instance's files."""
    lines = [
        line
        for name in ("common", instance)
        for line in (FOLDER / f"{name}.env").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (package systemd)")
@pytest.mark.parametrize(
    ("wrong", "complaint"), [("", ""), ("KillMod=mixed", "Unknown key"), ("KillMode=mixd", "Failed to parse")]
)
def test_systemd_reads_the_unit(tmp_path: Path, wrong: str, complaint: str) -> None:
    text = UNIT.read_text()
    assert PROGRAM in text
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(PROGRAM, "/bin/true").replace("KillMode=mixed", wrong or "KillMode=mixed"))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [
        line for line in done.stderr.splitlines() if UNIT.name in line
    ]  # it reads the machine's units too
    assert len(ours) == bool(complaint), done.stderr
    assert complaint in "".join(ours)


@pytest.mark.parametrize("instance", INSTANCES)
def test_what_an_instance_starts_could_be_typed(instance: str) -> None:
    given = variables(instance)
    others = [f"{name}={value}" for name, value in given.items() if name not in ("ROLE", "OPTIONS")]
    [command] = parse(f"{' '.join(others)} trtllm-mm-cache {given['ROLE']} {given['OPTIONS']}", instance)
    assert problem_of(command) is None


@pytest.mark.parametrize("instance", INSTANCES)
def test_the_variables_are_those_of_the_files_that_the_unit_names(instance: str) -> None:
    assert {"EnvironmentFile=/etc/mm-cache/common.env", "EnvironmentFile=/etc/mm-cache/%i.env"} <= set(
        UNIT.read_text().splitlines()
    )
    assert variables(instance)["DYN_DISCOVERY_BACKEND"] == "etcd"
