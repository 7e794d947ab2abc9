"""Fills by themselves, on both sides of the connector: used once, whole or not at all, never an exception."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from torch.utils._python_dispatch import TorchDispatchMode

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.arena.marks import Mark, MarkBoard
from trtllm_mm_cache.cache.arena.region import create_shared_storage
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.engines.own_tower import Fill
from trtllm_mm_cache.engines.vllm.connector import ArenaConnector
from trtllm_mm_cache.engines.vllm.handles import fill_entry, fill_of
from trtllm_mm_cache.engines.vllm.scheduler_side import SchedulerSide
from trtllm_mm_cache.engines.vllm.step_copies import StepCopies
from trtllm_mm_cache.engines.vllm.worker_side import WorkerSide

CPU = torch.device("cpu")
MADE = torch.arange(24, dtype=torch.float32).view(3, 8)


@dataclass
class Place:
    """A reserved extent for `MADE`, its mark, and what an engine is told of them."""

    reservation: Reservation
    mark: Mark
    fill: Fill

    def bytes(self) -> torch.Tensor:
        return self.reservation.view.clone()


@pytest.fixture
def place() -> Iterator[Place]:
    cache = MultimodalEmbeddingCacheManager(1 << 16)
    mark = MarkBoard().open()
    assert mark is not None
    reservation = cache.reserve("key", MADE.nbytes, owner="test")
    reservation.view.zero_()
    yield Place(reservation, mark, Fill(reservation.handle(MADE.dtype, (3, 8)), mark.handle, mark.nonce))
    reservation.abandon()
    cache.close()


@pytest.fixture
def encodes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64).set_(create_shared_storage(64), 0, (1,), (1,))


def worker_of(encodes: torch.Tensor) -> WorkerSide:
    return WorkerSide(CPU, encodes=Handle.of(encodes))


COPIES = ("clone", "copy_", "_to_copy", "cat", "stack", "index_select")


class Copied(TorchDispatchMode):
    """The bytes of each operation that copies a tensor, marks' single numbers aside, while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ in COPIES and made.numel() > 1:
            self.nbytes.append(made.nbytes)
        return made


def test_each_way_between_arena_and_vllm_is_one_copy(place: Place, encodes: torch.Tensor) -> None:
    worker, vllms = worker_of(encodes), dict[str, torch.Tensor]()
    with Copied() as copied:
        worker.save(StepCopies(fills={"key": place.fill}), "key", MADE)
    assert copied.nbytes == [MADE.nbytes]
    with Copied() as copied:
        worker.load(StepCopies([("key", place.fill.target)]), vllms)
    assert copied.nbytes == [MADE.nbytes]
    place.reservation.view.zero_()
    assert torch.equal(vllms["key"], MADE), "vLLM's own memory, which nothing in the arena changes"


def test_a_fill_survives_its_way(place: Place) -> None:
    assert fill_of(fill_entry(place.fill)) == place.fill


def test_what_is_made_lies_in_the_extent_and_is_marked(place: Place, encodes: torch.Tensor) -> None:
    assert place.mark.checksum() is None
    worker_of(encodes).save(StepCopies(fills={"key": place.fill}), "key", MADE)
    assert torch.equal(place.bytes().view(torch.float32).view(3, 8), MADE)
    assert place.mark.checksum() == xxhash.xxh3_64_intdigest(MADE.numpy().tobytes())
    assert encodes.tolist() == [1]


def test_what_no_request_wants_to_keep_is_counted_alone(place: Place, encodes: torch.Tensor) -> None:
    worker = worker_of(encodes)
    worker.save(StepCopies(), "key", MADE)
    worker.save(StepCopies(fills={"another": place.fill}), "key", MADE)
    assert place.mark.checksum() is None
    assert not place.bytes().any()
    assert encodes.tolist() == [2]


@pytest.mark.parametrize("made", [MADE[:2].contiguous(), MADE.double(), MADE.view(6, 4)])
def test_another_shape_or_dtype_writes_nothing(
    place: Place, encodes: torch.Tensor, made: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    worker_of(encodes).save(StepCopies(fills={"key": place.fill}), "key", made)
    assert place.mark.checksum() is None
    assert not place.bytes().any()
    assert "another shape" in caplog.text


def test_an_arena_that_is_gone_raises_nothing(
    place: Place, encodes: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    gone = replace(place.fill, target=replace(place.fill.target, file=b"/torch_1_2_3"))
    worker_of(encodes).save(StepCopies(fills={"key": gone}), "key", MADE)
    assert place.mark.checksum() is None
    assert "it is not kept" in caplog.text


def test_other_ranks_than_the_first_copy_nothing_out(place: Place) -> None:
    WorkerSide(CPU).save(StepCopies(fills={"key": place.fill}), "key", MADE)
    assert place.mark.checksum() is None


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False)])
def test_the_connector_of_the_first_rank_alone_counts(encodes: torch.Tensor, rank: int, counts: bool) -> None:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

    from trtllm_mm_cache.engines.vllm.connector import ENCODES
    from trtllm_mm_cache.engines.vllm.handles import plain

    extra = {ENCODES: plain(Handle.of(encodes))}
    transfer = SimpleNamespace(
        get_from_extra_config=extra.get, is_ec_producer=True, is_ec_consumer=True, ec_role="ec_both"
    )
    config: Any = SimpleNamespace(
        ec_transfer_config=transfer,
        device_config=SimpleNamespace(device_type="meta"),
        parallel_config=SimpleNamespace(rank=rank),
    )
    connector = ArenaConnector(config, ECConnectorRole.WORKER)
    assert connector.worker is not None
    connector.worker.save(StepCopies(), "key", MADE)
    assert encodes.tolist() == [int(counts)]


def test_a_fill_is_used_once(place: Place) -> None:
    """Preempted, a request's image is encoded again: by then the extent may be an entry or reserved anew."""
    side = SchedulerSide()
    params = {"key": fill_entry(place.fill)}
    side.note("request", params, {})
    assert not side.has("key"), "it must be encoded, not loaded"
    side.schedule("request", "key")
    assert side.take_step().fills == {"key": place.fill}
    side.note("request", params, {})
    side.schedule("request", "key")
    assert side.take_step().fills == {}


def test_a_fill_ends_with_its_request_and_is_its_own(place: Place) -> None:
    side = SchedulerSide()
    side.note("gone", {"key": fill_entry(place.fill)}, {})
    side.end("gone")
    side.note("other", {"another": fill_entry(place.fill)}, {})
    side.schedule("gone", "key")
    side.schedule("stranger", "another")
    assert side.take_step().fills == {}


def test_what_the_encoder_cache_has_is_taken_in_the_step_that_reaches_it(place: Place) -> None:
    side = SchedulerSide()
    side.note("request", {"key": fill_entry(place.fill)}, {"key": 10})
    side.compute("request", 10)
    assert side.take_step() == StepCopies()
    assert side.filling == ("request",)
    side.compute("request", 11)
    assert side.take_step().kept == {"key": place.fill}
    side.compute("request", 12)
    assert side.take_step() == StepCopies(), "a fill is used up"
    assert side.filling == ()


def test_what_the_tower_makes_in_a_step_is_not_taken_from_the_cache_too(place: Place) -> None:
    side = SchedulerSide()
    side.note("request", {"key": fill_entry(place.fill)}, {"key": 0})
    side.schedule("request", "key")
    side.compute("request", 30)
    assert side.take_step() == StepCopies(fills={"key": place.fill})


def test_what_the_encoder_cache_has_lies_in_the_extent_and_is_no_encode(
    place: Place, encodes: torch.Tensor
) -> None:
    worker, step = worker_of(encodes), StepCopies(kept={"key": place.fill})
    worker.keep(step, {"another": MADE})
    assert place.mark.checksum() is None, "its tokens were in the prefix cache"
    WorkerSide(CPU).keep(step, {"key": MADE})
    assert place.mark.checksum() is None, "another rank does so"
    worker.keep(step, {"key": MADE})
    assert torch.equal(place.bytes().view(torch.float32).view(3, 8), MADE)
    assert place.mark.checksum() == xxhash.xxh3_64_intdigest(MADE.numpy().tobytes())
    assert encodes.tolist() == [0]


def test_zeros_that_stand_for_a_failed_load_are_never_kept(place: Place, encodes: torch.Tensor) -> None:
    worker, vllms = worker_of(encodes), dict[str, torch.Tensor]()
    worker.load(
        StepCopies([("key", Handle(b"manager", b"/torch_1_2_3", 4096, 0, MADE.dtype, (3, 8)))]), vllms
    )
    assert torch.equal(vllms["key"], torch.zeros(3, 8))
    worker.keep(StepCopies(kept={"key": place.fill}), vllms)
    assert place.mark.checksum() is None
