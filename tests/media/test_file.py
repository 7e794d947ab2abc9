"""file: URLs: only regular files below the allowed folder, whatever the path, whatever changes meanwhile."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.media.conftest import Refused
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import (
    MediaFetchError,
    MediaForbiddenError,
    MediaReferenceError,
    MediaTooLargeError,
)
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.settings import MB, ImageLimits, MediaSettings

BODY = b"image" * 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    (allowed / "inner").mkdir(parents=True)
    (allowed / "photo é #1?%.png").write_bytes(BODY)
    (allowed / "inner" / "b.png").write_bytes(BODY)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "secret.png").write_bytes(b"secret")
    return allowed


def opened(folder: Path | None, max_bytes: int = MB) -> MediaSource:
    limits = ImageLimits(max_file_size_mb=max_bytes / MB)
    return MediaSource(MediaSettings(allowed_local_media_path=folder), limits)


def url(path: Path | str) -> str:
    return "file://" + quote(str(path))


async def test_files_below_the_folder_are_read(folder: Path) -> None:
    photo = folder / "photo é #1?%.png"
    async with opened(folder) as source:
        assert await source.fetch(url(photo), Scope()) == BODY
        assert await source.fetch(url(photo).replace("file:///", "file://localhost/"), Scope()) == BODY
        assert await source.fetch(url(photo).replace("file:", "FILE:"), Scope()) == BODY
        assert await source.fetch(url(folder / "inner" / "b.png"), Scope()) == BODY
        assert await source.fetch(url(f"{folder}/inner/../inner/./b.png"), Scope()) == BODY


async def test_links_that_stay_inside_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "link.png").symlink_to("inner/b.png")
    (folder / "way").symlink_to(folder / "inner")
    (tmp_path / "entrance").symlink_to(folder)
    async with opened(tmp_path / "entrance") as source:
        assert await source.fetch(url(folder / "link.png"), Scope()) == BODY
        assert await source.fetch(url(folder / "way" / "b.png"), Scope()) == BODY
        assert await source.fetch(url(tmp_path / "entrance" / "link.png"), Scope()) == BODY


async def test_nothing_is_read_unless_a_folder_is_allowed(folder: Path, refused: Refused) -> None:
    async with opened(None) as source:
        await refused(source, url(folder / "inner" / "b.png"), MediaForbiddenError)


@pytest.mark.parametrize(
    "path",
    [
        "{folder}",
        "{folder}/",
        "{folder}/.",
        "{folder}/..",
        "{folder}/../secret.png",
        "{folder}/../missing.png",
        "{folder}/inner/../../secret.png",
        "{folder}/%2e%2e/secret.png",
        "{folder}%2f..%2fsecret.png",
        "{folder}-not/secret.png",
        "{folder}/link-out.png",
        "{folder}/link-missing.png",
        "{folder}/way-out/secret.png",
        "{folder}/way-out/missing.png",
        "{folder}/loop",
        "{folder}/inner/b.png/x",
        "/etc/passwd",
        "/etc/missing",
        "/proc/self/environ",
        "/dev/zero",
        "/",
        "//etc/passwd",
    ],
)
async def test_nothing_else_is_read(folder: Path, tmp_path: Path, refused: Refused, path: str) -> None:
    (folder / "link-out.png").symlink_to(tmp_path / "secret.png")
    (folder / "link-missing.png").symlink_to(tmp_path / "missing.png")
    (folder / "way-out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    async with opened(folder) as source:
        await refused(source, "file://" + path.format(folder=folder), MediaForbiddenError)


async def test_what_exists_outside_cannot_be_told(folder: Path, tmp_path: Path, refused: Refused) -> None:
    async with opened(folder) as source:
        answers = {
            await refused(source, url(path), MediaForbiddenError)
            for path in (tmp_path / "secret.png", tmp_path / "missing.png", tmp_path, Path("/root/x"))
        }
    assert len(answers) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
async def test_only_regular_files(folder: Path, refused: Refused, kind: str) -> None:
    path = folder / "s"
    listening = socket.socket(socket.AF_UNIX)
    try:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            listening.bind(str(path))
        async with opened(folder) as source:
            await refused(source, url(path), MediaForbiddenError)
    finally:
        listening.close()


async def test_devices_are_not_opened(refused: Refused) -> None:
    async with opened(Path("/dev")) as source:
        for name in ("zero", "null", "random"):
            await refused(source, f"file:///dev/{name}", MediaForbiddenError)


async def test_a_missing_file_inside_is_said_to_be_missing(folder: Path, refused: Refused) -> None:
    async with opened(folder) as source:
        await refused(source, url(folder / "secret.png"), MediaFetchError)
        await refused(source, url(folder / "secret" / "b.png"), MediaFetchError)


async def test_a_folder_exchanged_for_a_link_after_the_check_is_refused(
    folder: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check resolves the path; the attacker then swaps what was resolved."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.png").write_bytes(b"secret")
    resolve = os.path.realpath

    def resolve_then_swap(path: os.PathLike[str] | str) -> str:
        resolved = resolve(path)
        if resolved.endswith("inner/b.png"):
            (folder / "inner").rename(folder / "before")
            (folder / "inner").symlink_to(tmp_path / "outside")
        return resolved

    monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
    async with opened(folder) as source:
        await refused(source, url(folder / "inner" / "b.png"), MediaForbiddenError)


async def test_a_file_exchanged_for_a_link_after_the_check_is_refused(
    folder: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = os.path.realpath

    def resolve_then_swap(path: os.PathLike[str] | str) -> str:
        resolved = resolve(path)
        if resolved.endswith("inner/b.png"):
            (folder / "inner" / "b.png").unlink()
            (folder / "inner" / "b.png").symlink_to(tmp_path / "secret.png")
        return resolved

    monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
    async with opened(folder) as source:
        await refused(source, url(folder / "inner" / "b.png"), MediaForbiddenError)


async def test_the_size_limit(folder: Path, refused: Refused) -> None:
    huge = folder / "huge.png"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    async with opened(folder, max_bytes=len(BODY)) as source:
        assert await source.fetch(url(folder / "inner" / "b.png"), Scope()) == BODY
        # The size it says it has, so nothing was read.
        assert str(1 << 40) in await refused(source, url(huge), MediaTooLargeError)
    async with opened(folder, max_bytes=len(BODY) - 1) as source:
        await refused(source, url(folder / "inner" / "b.png"), MediaTooLargeError)


async def test_a_file_longer_than_it_says_is_cut_off(refused: Refused) -> None:
    # Files of procfs have size 0 and content all the same, like a file that grows while it is read.
    process = Path(f"/proc/{os.getpid()}")
    async with opened(process, max_bytes=10) as source:
        await refused(source, url(process / "status"), MediaTooLargeError)


@pytest.mark.parametrize(
    "reference",
    [
        "file:",
        "file:photo.png",
        "file://secret.test/photo.png",
        "file:///a?b",
        "file:///a#b",
        "file:///a%00b",
        "file://[",
    ],
)
async def test_references_that_cannot_be_used(folder: Path, refused: Refused, reference: str) -> None:
    async with opened(folder) as source:
        await refused(source, reference, MediaReferenceError)


async def test_no_descriptor_is_left_open(folder: Path, refused: Refused) -> None:
    async with opened(folder) as source:
        await source.fetch(url(folder / "inner" / "b.png"), Scope())
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await source.fetch(url(folder / "inner" / "b.png"), Scope())
            await refused(source, url(folder / "inner" / "missing.png"), MediaFetchError)
            await refused(source, url(folder / "inner"), MediaForbiddenError)
        assert set(os.listdir("/proc/self/fd")) == before
