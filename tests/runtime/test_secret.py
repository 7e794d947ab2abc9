"""The secret and the discovery folder: made for this user alone, and refused where others can get at them."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.runtime.secret import discovery_folder, load_membership
from trtllm_mm_cache.settings import DiscoverySettings

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to another user")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYN_FILE_KV", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "discovery"
    monkeypatch.setenv("DYN_FILE_KV", str(folder))
    return folder


def proves_to(one: DiscoverySettings, other: DiscoverySettings) -> bool:
    call = load_membership(one).call("encode", 1)
    return bool(load_membership(other).check("encode", 1, call.proof()))


def test_the_first_process_makes_folder_and_secret_for_this_user_alone(folder: Path) -> None:
    assert proves_to(DiscoverySettings(), DiscoverySettings())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [file.name for file in folder.iterdir()] == ["secret"]
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600


def test_processes_that_start_together_have_one_secret(folder: Path) -> None:
    with ProcessPoolExecutor(8, mp_context=get_context("fork")) as pool:
        assert len(set(pool.map(_one_proof, range(32)))) == 1
    assert [file.name for file in folder.iterdir()] == ["secret"]


def _one_proof(_: int) -> str:
    return load_membership(DiscoverySettings()).mac("same")


def test_a_file_that_is_named_comes_first(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("s" * 32 + "\n")
    file.chmod(0o600)
    named = DiscoverySettings(secret_file=file, discovery_backend="etcd")
    assert proves_to(named, named)
    assert not folder.exists()


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_secret_closed_to_others_is_read(tmp_path: Path, mode: int) -> None:
    load_membership(DiscoverySettings(secret_file=_secret(tmp_path, mode)))


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o644, 0o666])
def test_a_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigurationError, match="open to other users"):
        load_membership(DiscoverySettings(secret_file=_secret(tmp_path, mode)))


@as_root
def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    file = _secret(tmp_path, 0o600)
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(ConfigurationError, match=f"belongs to user {NOBODY}"):
        load_membership(DiscoverySettings(secret_file=file))


@pytest.mark.parametrize("content", ["", "short", "x" * 31 + "\n", "x" * 5000])
def test_a_secret_of_no_use_is_refused(tmp_path: Path, content: str) -> None:
    file = _secret(tmp_path, 0o600)
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="32 to 4096 bytes") as caught:
        load_membership(DiscoverySettings(secret_file=file))
    assert not content or content.strip() not in str(caught.value)


def test_a_secret_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            load_membership(DiscoverySettings(secret_file=file))


@pytest.mark.parametrize("backend", ["etcd", "kubernetes"])
def test_in_a_cluster_there_is_no_default(backend: str) -> None:
    with pytest.raises(ConfigurationError, match="MM_CACHE_SECRET_FILE"):
        load_membership(DiscoverySettings.model_validate({"discovery_backend": backend}))


def test_without_a_name_the_folder_is_the_users_own_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="set DYN_FILE_KV"):
        discovery_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert discovery_folder() == tmp_path / "trtllm-mm-cache" == Path(os.environ["DYN_FILE_KV"])


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        discovery_folder()


@as_root
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(ConfigurationError, match=f"belongs to user {NOBODY}"):
        discovery_folder()


def test_a_folder_that_others_can_exchange_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyones = tmp_path / "everyones"
    everyones.mkdir()
    monkeypatch.setenv("DYN_FILE_KV", str(everyones / "mine"))
    everyones.chmod(0o777)
    with pytest.raises(ConfigurationError, match=r"exchange it.*everyones is writable"):
        discovery_folder()
    everyones.chmod(0o1777)
    discovery_folder()


def test_a_file_in_its_place_is_refused(folder: Path) -> None:
    folder.touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        discovery_folder()


def _secret(folder: Path, mode: int) -> Path:
    file = folder / "secret"
    file.write_text("0123456789abcdef" * 2)
    file.chmod(mode)
    return file
