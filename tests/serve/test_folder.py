"""The run folder is its owner's alone, and so is the discovery in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.serve.folder import RunFolder


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_everything_in_it_is_closed_to_others(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    secret = folder.make_secret()
    folder.record([("PD worker 1", "1", "2", "/log")])
    made_later = folder.path / "by a child"
    made_later.mkdir()
    assert [mode(folder.path), mode(made_later)] == [0o700, 0o700]
    assert [mode(secret), mode(folder.path / "processes.tsv")] == [0o600, 0o600]
    assert mode(folder.claim_discovery(None)) == 0o700


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    assert mode(RunFolder(tmp_path / "run").path) == 0o700


def test_each_run_has_another_secret_of_256_bits(tmp_path: Path) -> None:
    secrets = {RunFolder(tmp_path / "run").make_secret().read_text() for _ in range(3)}
    assert len(secrets) == 3
    assert {len(bytes.fromhex(secret.strip())) for secret in secrets} == {32}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 12345, 12345)
    with pytest.raises(ConfigurationError, match="is another user's; set RUN_DIR"):
        RunFolder(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be made: Not a directory; set RUN_DIR"):
        RunFolder(tmp_path / "file" / "run")


def test_discovery_belongs_to_one_stack_as_long_as_that_lives(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # the kernel lets go of what a process holds when that ends
        RunFolder(tmp_path / "first").claim_discovery(None)
        os._exit(0)
    os.waitpid(child, 0)
    first = RunFolder(tmp_path / "first")
    path = first.claim_discovery(None)
    with pytest.raises(ConfigurationError, match=rf"DYN_FILE_KV={path} belongs to a stack that runs.*unset"):
        RunFolder(tmp_path / "second").claim_discovery(str(path))
