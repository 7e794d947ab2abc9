"""The store tier over a real Redis server: frozen, dead, restarted, full, lying; users, TLS, clusters."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from tests.e2e.stack import free_port, wait_until
from tests.tiers.bench import FINGERPRINT, NBYTES, Bench, item_of, redis_running
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.tiers.format import EntryName, RefusedEntryError
from trtllm_mm_cache.tiers.storage import StorageError
from trtllm_mm_cache.tiers.stored import StoredTier

redis = pytest.importorskip("redis", reason="the store's client is not installed: the extra `store`")

from trtllm_mm_cache.tiers.store import StoreStorage  # noqa: E402


@pytest.fixture
def tier_kind() -> str:
    return "store"


@pytest.fixture
def tier(bench: Bench) -> StoredTier:
    return bench.tier()


def store_tier(bench: Bench, url: str, *, timeout_s: float = 5, **limits: float) -> StoredTier:
    return bench.tier(storage=StoreStorage(url, FINGERPRINT, timeout_s=timeout_s), **limits)


async def fails(bench: Bench, tier: StoredTier, match: str) -> None:
    with pytest.raises(StorageError, match=match):
        await tier.fill(item_of(1), bench.receiver.receive)


async def test_values_of_many_pieces_arrive_whole(redis_server: int) -> None:
    storage = StoreStorage(f"redis://127.0.0.1:{redis_server}", FINGERPRINT, timeout_s=5)
    payload, header = os.urandom(7_654_321), os.urandom(4096)
    name = EntryName("a" * 64, b"t" * 16)
    storage.store(name, header, memoryview(payload))
    found = storage.look_up(name)
    assert found is not None
    assert (found.header, found.size) == (header, 4096 + len(payload))
    into = bytearray(len(payload) + 10)
    for start in range(0, len(into), 500_000):
        piece = memoryview(into)[start : start + 500_000]
        assert found.read(piece, 4096 + start) == min(len(piece), max(0, len(payload) - start))
    assert into[: len(payload)] == payload
    found.close()
    storage.store(name, header, memoryview(payload[:10]))
    found = storage.look_up(name)
    assert found is not None
    assert found.size == 4096 + 10, "the new one is in the place of the old one"
    found.close()
    storage.close()


async def test_a_frozen_store_is_a_miss_within_the_deadline_and_is_passed_over(bench: Bench) -> None:
    with redis_running() as (port, server):
        tier = store_tier(bench, f"redis://127.0.0.1:{port}")
        await bench.keep(tier, item_of(1))
        frozen = store_tier(bench, f"redis://127.0.0.1:{port}", timeout_s=0.1, lookup_s=0.05)
        server.send_signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                await fails(bench, frozen, "not answered|within 0.05")
            assert await frozen.fill(item_of(1), bench.receiver.receive) is None
            assert frozen.lookups == {"failed": 3, "passed_over": 1}
        finally:
            server.send_signal(signal.SIGCONT)
        await bench.nothing_held()
        bench.clock.now += 11
        await asyncio.sleep(0)
        assert await bench.brought(tier, item_of(1))


async def test_it_is_frozen_in_the_middle_of_a_value(bench: Bench) -> None:
    with redis_running() as (port, server):
        tier = store_tier(bench, f"redis://127.0.0.1:{port}", timeout_s=1)
        await bench.keep(tier, item_of(1))
        opened: list[int] = []
        look_up = tier._storage.look_up

        def then_freeze(name: EntryName) -> object:
            found = look_up(name)
            server.send_signal(signal.SIGSTOP)
            opened.append(1)
            return found

        tier._storage.look_up = then_freeze  # type: ignore[method-assign, assignment]
        try:
            await fails(bench, tier, "not answered|reached")
        finally:
            server.send_signal(signal.SIGCONT)
        assert opened == [1]
        await bench.nothing_held()
        tier._storage.look_up = look_up  # type: ignore[method-assign]
        assert await bench.brought(tier, item_of(1)), "no late byte of the old connection"


async def test_a_dead_store_costs_misses_and_a_restarted_one_is_used_again(bench: Bench) -> None:
    port = free_port()
    tier = store_tier(bench, f"redis://127.0.0.1:{port}", failures=1000)
    await fails(bench, tier, "cannot be reached")
    with redis_running(port=port) as (_, server):
        await bench.keep(tier, item_of(1))
        assert await bench.brought(tier, item_of(1))
        server.kill()
        server.wait()
        await fails(bench, tier, "cannot be reached")
    with redis_running(port=port):
        assert not await bench.brought(tier, item_of(1)), "an idle connection that was closed costs no miss"
        bench.clock.now += 61
        await bench.keep(tier, item_of(1))
        assert await bench.brought(tier, item_of(1))


async def test_users_and_passwords(bench: Bench) -> None:
    with redis_running("--requirepass", "hunter2") as (port, _):
        await fails(bench, store_tier(bench, f"redis://:wrong@127.0.0.1:{port}"), "user or password")
        await fails(bench, store_tier(bench, f"redis://127.0.0.1:{port}"), "user or password")
        tier = store_tier(bench, f"redis://:hunter2@127.0.0.1:{port}")
        await bench.keep(tier, item_of(1))
        assert await bench.brought(tier, item_of(1))
        client = redis.Redis(port=port, password="hunter2")
        client.acl_setuser("reader", enabled=True, passwords=["+read"], keys=["*"], categories=["+@read"])
        client.close()
        reader = store_tier(bench, f"redis://reader:read@127.0.0.1:{port}")
        assert await bench.brought(reader, item_of(1))
        with pytest.raises(StorageError, match="NoPermissionError"):
            await reader.drop(Selection(key=item_of(1).key.hex), deadline_s=5)


async def test_tls(bench: Bench, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    tls = free_port()
    options = ("--tls-port", str(tls), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(tmp_path / "ca"))
    keys = ("--tls-cert-file", str(tmp_path / "cert"), "--tls-key-file", str(tmp_path / "key"))
    with redis_running(*options, *keys):
        trusting = f"rediss://127.0.0.1:{tls}?ssl_ca_certs={tmp_path}/ca"
        tier = store_tier(bench, trusting)
        await bench.keep(tier, item_of(1))
        assert await bench.brought(tier, item_of(1))
        await fails(bench, store_tier(bench, f"rediss://127.0.0.1:{tls}"), "reached")


async def test_a_store_that_evicts_answers_with_what_is_left(bench: Bench) -> None:
    with redis_running("--maxmemory", "2mb", "--maxmemory-policy", "allkeys-lru") as (port, _):
        tier = store_tier(bench, f"redis://127.0.0.1:{port}")
        await bench.keep(tier, *map(item_of, range(40)))
        found = [await bench.brought(tier, item_of(number)) for number in range(40)]
        assert 0 < sum(found) < 40


async def test_a_full_store_that_evicts_nothing_takes_nothing(bench: Bench) -> None:
    with redis_running("--maxmemory", "1500kb", "--maxmemory-policy", "noeviction") as (port, _):
        tier = store_tier(bench, f"redis://127.0.0.1:{port}")
        await bench.keep(tier, *map(item_of, range(30)))
        outcomes = tier.offers.outcomes
        assert outcomes["stored"] > 0
        assert outcomes["failed"] > 0
        found = [await bench.brought(tier, item_of(number)) for number in range(30)]
        assert sum(found) == outcomes["stored"], "whole or not at all"


async def test_what_strangers_write_is_refused_by_name_and_removed(bench: Bench, redis_server: int) -> None:
    client = redis.Redis(port=redis_server)
    tier = bench.tier()
    await bench.keep(tier, item_of(1), item_of(2))
    one, two = (tier._storage._key(EntryName(item_of(n).key.hex)) for n in (1, 2))  # type: ignore[attr-defined]
    good, other = client.get(one), client.get(two)
    for written, reason in (
        (other, "other_key"),
        (good[:-1] + b"\xff", "damaged"),
        (good[:-100], "truncated"),
        (good + b"more", "truncated"),
        (os.urandom(len(good)), "garbage"),
        (b"x", "truncated"),
    ):
        client.set(one, written)
        reader = bench.tier()
        with pytest.raises(RefusedEntryError):
            await bench.brought(reader, item_of(1))
        assert reader.counts.refused == {reason: 1}
        assert client.get(one) is None
        assert await bench.brought(reader, item_of(2))
    client.hset(one, "not", "a string")
    await fails(bench, bench.tier(), "ResponseError")
    client.close()


async def test_a_key_that_was_poisoned_first_is_stored_anew(bench: Bench, redis_server: int) -> None:
    client = redis.Redis(port=redis_server)
    tier = bench.tier()
    client.set(tier._storage._key(EntryName(item_of(1).key.hex)), b"garbage" * 1000)  # type: ignore[attr-defined]
    with pytest.raises(RefusedEntryError):
        await bench.brought(tier, item_of(1))
    await bench.keep(tier, item_of(1))
    assert tier.offers.outcomes == {"stored": 1}
    assert await bench.brought(tier, item_of(1))
    client.close()


async def test_a_maximum_age_is_the_servers_expiry(bench: Bench, redis_server: int) -> None:
    storage = StoreStorage(f"redis://127.0.0.1:{redis_server}", FINGERPRINT, timeout_s=5, max_age_s=3600)
    tier = bench.tier(storage=storage)
    await bench.keep(tier, item_of(1))
    client = redis.Redis(port=redis_server)
    (key,) = client.keys()
    assert 3590 < client.ttl(key) <= 3600
    assert client.strlen(key) == 4096 + NBYTES
    client.close()


async def test_a_drop_leaves_what_is_not_ours(bench: Bench, redis_server: int) -> None:
    client = redis.Redis(port=redis_server)
    client.set("theirs", "x")
    ours, theirs = bench.tier(), bench.tier(fingerprint="cd" * 32)
    await bench.keep(ours, *map(item_of, range(5)))
    await bench.keep(theirs, item_of(9))
    assert (await ours.drop(Selection(), deadline_s=5)).entries == 5
    assert len(client.keys()) == 2
    assert (await ours.drop(Selection(content=item_of(9).content), deadline_s=5)).entries == 1
    assert client.keys() == [b"theirs"]
    client.close()


async def test_a_drop_from_a_dead_store_is_an_error(bench: Bench) -> None:
    tier = store_tier(bench, f"redis://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match="drop again"):
        await tier.drop(Selection(), deadline_s=5)


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://127.0.0.1:port", "nonsense"])
def test_a_url_that_is_none_is_an_operators_mistake(url: str) -> None:
    with pytest.raises(ConfigurationError, match="MM_CACHE_STORE_URL"):
        StoreStorage(url, FINGERPRINT)


@pytest.fixture
def cluster(folder: Path) -> Iterator[int]:
    """Two nodes, each with half of the slots; the port of one."""
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed")
    with ExitStack() as nodes:
        ports = []
        for _ in range(2):
            port = free_port()
            own = folder.parent / str(port)
            own.mkdir()
            options = ("--cluster-enabled", "yes", "--dir", str(own), "--cluster-port", str(free_port()))
            nodes.enter_context(redis_running(*options, port=port))
            ports.append(port)
        for port, slots in zip(ports, ("0 8191", "8192 16383"), strict=True):
            _cli(port, f"CLUSTER ADDSLOTSRANGE {slots}")
        info = _cli(ports[1], "CLUSTER MYID")
        assert len(info) == 40
        bus = _cli(ports[1], "CONFIG GET cluster-port").split()[-1]
        _cli(ports[0], f"CLUSTER MEET 127.0.0.1 {ports[1]} {bus}")
        wait_until(
            lambda: all("cluster_state:ok" in _cli(port, "CLUSTER INFO") for port in ports), 30, "no cluster"
        )
        wait_until(
            lambda: all(len(_cli(port, "CLUSTER NODES").splitlines()) == 2 for port in ports),
            30,
            "no meeting",
        )
        yield ports[0]


def _cli(port: int, words: str) -> str:
    command = ["redis-cli", "-p", str(port), *words.split()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


async def test_a_cluster(bench: Bench, cluster: int) -> None:
    tier = store_tier(bench, f"redis://127.0.0.1:{cluster}")
    items = [item_of(number, salt="a" if number % 2 else None) for number in range(12)]
    await bench.keep(tier, *items)
    assert tier.offers.outcomes == {"stored": 12}
    assert len(tier._storage._nodes._slots) > 0, "some keys lie on the other node"  # type: ignore[attr-defined]
    other = store_tier(bench, f"redis://127.0.0.1:{cluster}")
    assert [await bench.brought(other, item) for item in items] == [True] * 12
    assert (await other.drop(Selection(tag=items[1].scope.tag), deadline_s=5)).entries == 6
    assert (await other.drop(Selection(content=items[0].content), deadline_s=5)).entries == 1
    assert (await other.drop(Selection(), deadline_s=5)).entries == 5
