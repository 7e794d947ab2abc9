"""The disk tier's files: damage, bounds, one writer, bad disks."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiers.bench import FILE_BYTES, FINGERPRINT, NBYTES, SECRET, Bench, item_of, name_of, until
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import ConfigurationError, MmCacheError
from trtllm_mm_cache.tiers.disk import DiskStorage
from trtllm_mm_cache.tiers.disk_index import blocks
from trtllm_mm_cache.tiers.format import HEADER_BYTES, EntryName, Header, RefusedEntryError, Sealer
from trtllm_mm_cache.tiers.storage import StorageError, StorageFullError


@pytest.fixture
def tier_kind() -> str:
    return "disk"


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
CAPACITY = 64 * 1024 * 1024


def judge(data: bytes, key: str) -> Header | None:
    try:
        return Sealer(SECRET).open(data, key)
    except RefusedEntryError:
        return None


def keep_all(data: bytes, key: str) -> Header | None:
    return Header("image", key, "", None, None, 1, "", (1, 1), None, 0.0)  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and len(path.name) == 64)


def writer(folder: Path, capacity: int = CAPACITY, fingerprint: str = FINGERPRINT) -> DiskStorage:
    storage = DiskStorage(folder, fingerprint, capacity)
    storage.tidy(keep_all)
    return storage


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def put(storage: DiskStorage, number: int, nbytes: int = NBYTES) -> EntryName:
    name = EntryName(f"{number:064x}"[::-1])
    storage.store(name, bytes(HEADER_BYTES), memoryview(bytes(nbytes)))
    return name


async def refused(bench: Bench, number: int = 1) -> str:
    tier = bench.tier()
    with pytest.raises(RefusedEntryError):
        await bench.brought(tier, item_of(number))
    assert not await bench.brought(tier, item_of(number)), "it was removed"
    (reason,) = tier.counts.refused
    return reason


async def test_damage_is_refused_by_name_and_removed(bench: Bench, folder: Path) -> None:
    tier = bench.tier()
    for number, reason, change in (
        (1, "damaged", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (2, "damaged", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]),
        (3, "truncated", lambda data: data[:-1]),
        (4, "truncated", lambda data: data + b"\0"),
        (5, "truncated", lambda data: data[:1000]),
        (6, "truncated", lambda data: b""),
        (7, "garbage", lambda data: os.urandom(len(data))),
        (8, "foreign_version", lambda data: data[:7] + b"\x09" + data[8:]),
    ):
        before = set(files(folder))
        await bench.keep(tier, item_of(number))
        (file,) = set(files(folder)) - before
        file.write_bytes(change(file.read_bytes()))
        assert await refused(bench, number) == reason
        assert not file.exists()
        await bench.keep(bench.tier(), item_of(number))


async def test_a_file_in_another_ones_place_is_refused(bench: Bench, folder: Path) -> None:
    await bench.keep(bench.tier(), item_of(1), item_of(2))
    one, two = files(folder)
    swapped = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(swapped)
    assert [await refused(bench, number) for number in (1, 2)] == ["other_key", "other_key"]


async def test_a_file_of_another_model_in_its_place_is_refused(bench: Bench, folder: Path) -> None:
    await bench.keep(bench.tier(), item_of(1))
    (ours,) = files(folder)
    false = ours.with_name("false")
    sealer = Sealer(SECRET)
    header = replace(sealer.open(ours.read_bytes(), ours.name), fingerprint="cd" * 32)
    sealed = sealer.seal(header)
    assert sealed is not None
    false.write_bytes(sealed + ours.read_bytes()[HEADER_BYTES:])
    false.replace(ours)
    assert await refused(bench) == "foreign_model"


async def test_what_lies_at_a_key_before_is_replaced(bench: Bench, folder: Path) -> None:
    """Poisoned first: garbage at the path of a key that is stored later."""
    tier = bench.tier()
    await until(lambda: tier._storage.writes)
    path = tier._storage._folder.path(item_of(1).key.hex)  # type: ignore[attr-defined]
    path.parent.mkdir()
    path.write_bytes(b"garbage")
    reader = bench.tier()
    with pytest.raises(RefusedEntryError):
        await bench.brought(reader, item_of(1))
    path.write_bytes(b"garbage")
    tier._storage.store(name_of(item_of(1)), b"h" * HEADER_BYTES, memoryview(b"p" * NBYTES))
    assert path.read_bytes() == b"h" * HEADER_BYTES + b"p" * NBYTES


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
async def test_what_is_no_file_is_refused(bench: Bench, folder: Path, kind: str) -> None:
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("only root can make a device")
    await bench.keep(bench.tier(), item_of(1))
    (path,) = files(folder)
    good = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    else:
        (folder / "elsewhere").write_bytes(good)
        path.symlink_to(folder / "elsewhere")
    with pytest.raises(MmCacheError):
        await bench.brought(bench.tier(), item_of(1))


# -- bounds ----------------------------------------------------------------------------------------------


def used_bytes(folder: Path) -> int:
    return sum(blocks(file.stat().st_size) for file in files(folder))


def test_it_is_bounded_to_the_byte_and_the_least_recently_used_goes(folder: Path) -> None:
    size = blocks(FILE_BYTES)
    storage = writer(folder, capacity=3 * size)
    names = [put(storage, number) for number in range(3)]
    assert used_bytes(folder) == 3 * size == storage.contents().nbytes
    found = storage.look_up(names[0])
    assert found is not None
    found.close()
    put(storage, 3)
    assert [storage.touch(name) for name in names] == [True, False, True]
    put(storage, 4, nbytes=2 * NBYTES)
    assert used_bytes(folder) <= 3 * size
    with pytest.raises(StorageFullError):
        put(storage, 5, nbytes=4 * NBYTES)
    assert storage.contents().entries == len(files(folder))
    storage.close()


def test_a_use_by_another_process_counts(folder: Path) -> None:
    storage = writer(folder, capacity=2 * blocks(FILE_BYTES))
    reader = DiskStorage(folder, FINGERPRINT, CAPACITY)
    names = [put(storage, number) for number in range(2)]
    for number, name in enumerate(names):
        os.utime(storage._folder.path(name.key), (number + 1, number + 1))
    storage.close()
    storage = writer(folder, capacity=2 * blocks(FILE_BYTES))
    assert reader.touch(names[0])
    put(storage, 2)
    assert [storage.touch(name) for name in names] == [True, False]
    storage.close()


def test_a_smaller_capacity_holds_from_the_start(folder: Path) -> None:
    storage = writer(folder)
    for number in range(8):
        put(storage, number)
    storage.close()
    storage = writer(folder, capacity=3 * blocks(FILE_BYTES))
    assert len(files(folder)) == 3
    storage.close()


def test_what_cannot_be_removed_does_not_stop_eviction(folder: Path) -> None:
    storage = writer(folder, capacity=3 * blocks(FILE_BYTES))
    names = [put(storage, number) for number in range(3)]
    immovable = storage._folder.path(names[0].key)
    immovable.unlink()
    immovable.mkdir()  # unlink fails
    put(storage, 3)
    assert [storage._folder.path(name.key).exists() for name in names] == [True, False, True]
    storage.close()


def test_ten_thousand_entries_are_indexed_without_reading_them(folder: Path) -> None:
    """The time is measured in benchmarks/tiers.py; here: no entry is opened."""
    storage = writer(folder)
    names = [put(storage, number, nbytes=1) for number in range(500)]
    storage.close()
    trace = folder / "trace"
    assert trace.parent.exists()
    before = {name.key: storage._folder.path(name.key).stat().st_atime_ns for name in names}
    again = writer(folder)
    assert again.contents().entries == 500
    assert {name.key: again._folder.path(name.key).stat().st_atime_ns for name in names} == before
    again.close()


# -- one writer ------------------------------------------------------------------------------------------


async def test_two_processes_one_folder_one_writes_and_takes_over(bench: Bench, folder: Path) -> None:
    one = bench.tier()
    await until(lambda: one._storage.writes)
    two = bench.tier()
    await bench.keep(two, item_of(1))
    assert two.offers.outcomes == {"elsewhere": 1}
    assert files(folder) == []
    await bench.keep(one, item_of(1))
    assert await bench.brought(two, item_of(1))
    one._storage.close()
    two._storage.tidy(judge)
    bench.clock.now += 61
    await bench.keep(two, item_of(2))
    assert await bench.brought(one, item_of(2)), "the other reads now"


def test_two_real_processes_keep_to_one_limit(folder: Path) -> None:
    """Both store as fast as they can; whoever comes first writes."""
    program = (
        "import sys; from tests.tiers.test_disk import *\n"
        "storage = writer(Path(sys.argv[1]), capacity=4 * blocks(FILE_BYTES))\n"
        "for number in range(200): storage.writes and put(storage, number)\n"
        "print(storage.writes, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    both = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    wrote = []
    for each in both:
        assert each.stdout is not None
        wrote.append(each.stdout.readline().strip())
    assert sorted(wrote) == ["False", "True"]
    assert used_bytes(folder) == 4 * blocks(FILE_BYTES)
    for each in both:
        each.communicate("")
        assert each.returncode == 0


def test_what_others_have_left_is_removed(folder: Path) -> None:
    old = writer(folder, fingerprint="cd" * 32)
    put(old, 1)
    old.close()
    storage = writer(folder)
    put(storage, 2)
    path = files(folder)[0]
    (path.parent / ".tmp-0123456789abcdef").write_bytes(b"half of an entry")
    assert len(files(folder)) == 1
    storage.close()
    storage = writer(folder)
    assert list(folder.rglob(".tmp*")) == []
    assert storage.contents().entries == 1
    storage.close()


def test_sweeping_removes_what_is_not_to_be_kept(folder: Path) -> None:
    storage = DiskStorage(folder, FINGERPRINT, CAPACITY, sweep_s=0.0)
    storage.tidy(keep_all)
    put(storage, 1)
    storage.tidy(lambda data, key: None)
    assert files(folder) == []
    assert storage.contents()[:2] == (0, 0)
    storage.close()


def test_files_and_folders_are_this_users_alone(folder: Path) -> None:
    storage = writer(folder)
    put(storage, 1)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()}
    assert modes | {stat.S_IMODE(folder.stat().st_mode)} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()} == {0o600}
    storage.close()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_an_open_folder_is_refused_with_the_way_out(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        DiskStorage(folder, FINGERPRINT, CAPACITY)


# -- bad disks -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder.mkdir(mode=0o700)
    run("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(folder))
    yield folder
    run("umount", "-l", str(folder))


@as_root
def test_a_full_disk_costs_the_oldest_entries_and_nothing_torn(small_disk: Path) -> None:
    storage = writer(small_disk)
    for number in range(40):
        put(storage, number)
    left = files(small_disk)
    assert 0 < len(left) < 16
    assert {file.stat().st_size for file in left} == {FILE_BYTES}
    (small_disk / "foreign").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    put(storage, 41)
    for file in files(small_disk):
        storage.remove(EntryName(file.name))
    (small_disk / "more").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(StorageFullError):
        put(storage, 42)
    assert files(small_disk) == []
    storage.close()


@as_root
async def test_a_disk_that_became_read_only_serves_and_stores_nothing(bench: Bench, small_disk: Path) -> None:
    tier = bench.tier()
    await bench.keep(tier, item_of(1))
    run("mount", "--bind", str(small_disk), str(small_disk))
    run("mount", "-o", "remount,bind,ro", str(small_disk))
    try:
        await bench.keep(tier, item_of(2))
        assert tier.offers.outcomes == {"stored": 1, "failed": 1}
        for each in (tier, bench.tier()):
            assert await bench.brought(each, item_of(1))
        with pytest.raises(StorageError):
            await tier.drop(Selection(), deadline_s=5)
    finally:
        run("umount", str(small_disk))


@as_root
async def test_input_output_errors_are_misses(bench: Bench, folder: Path) -> None:
    """A process's own memory at address 0, in the place of an entry: reading it is EIO."""
    await bench.keep(bench.tier(), item_of(1))
    (path,) = files(folder)
    run("mount", "--bind", f"/proc/{os.getpid()}/mem", str(path))
    try:
        tier = bench.tier()
        with pytest.raises(StorageError, match="Input/output error"):
            await tier.fill(item_of(1), bench.receiver.receive)
        assert tier.lookups == {"failed": 1}
    finally:
        run("umount", str(path))


async def test_a_removed_folder_costs_misses_and_is_made_again(bench: Bench, folder: Path) -> None:
    tier = bench.tier()
    await bench.keep(tier, item_of(1))
    shutil.rmtree(folder)
    assert not await bench.brought(tier, item_of(1))
    await bench.keep(tier, item_of(2))
    assert tier.offers.outcomes["failed"] == 1
    tier._storage.tidy(judge)
    await bench.keep(tier, item_of(3))
    assert await bench.brought(tier, item_of(3))


def test_closing_twice_and_reading_afterwards(folder: Path) -> None:
    storage = writer(folder)
    name = put(storage, 1)
    found = storage.look_up(name)
    assert found is not None
    storage.remove(name)
    assert found.read(memoryview(bytearray(10)), HEADER_BYTES) == 10, "open files outlive their removal"
    found.close()
    found.close()
    storage.close()
    storage.close()
    assert time.monotonic() > 0
