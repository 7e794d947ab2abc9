"""The encode worker's second level: what a call leaves in its arena. A real tower, a real NIXL agent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dynamo.runtime import Context

from tests.e2e.stack import new_image, png
from tests.encode.bench import Bench, running
from trtllm_mm_cache.cache.key import content_digest
from trtllm_mm_cache.cache.scope import salt_tag
from trtllm_mm_cache.engines.transformers import TransformersVisionEncoder
from trtllm_mm_cache.errors import EncodeOverloadedError
from trtllm_mm_cache.runtime.control import DropRequest
from trtllm_mm_cache.runtime.messages import EncodeCancel
from trtllm_mm_cache.settings import MB


async def test_what_may_be_retained_is_a_second_level(bench: Bench) -> None:
    media = png(new_image(32, 32))
    first, second = [await bench.call(media, retain=True) for _ in range(2)]
    assert (first.origin, second.origin) == ("encoded", "cached")
    assert (first.address, first.checksum) == (second.address, second.checksum)


async def test_what_may_not_be_retained_is_gone_after_its_read(bench: Bench) -> None:
    media = png(new_image(32, 32))
    for _ in range(2):
        ready = await bench.call(media, retain=False)
        assert ready.origin == "encoded"
        assert bench.manager.keys() == []
        assert bench.manager.statistics().arena.used_bytes == ready.nbytes, "the READ still needs it"
        assert bench.exporter.release(ready.token)
        assert bench.manager.statistics().arena.used_bytes == 0


async def test_what_one_salt_stored_is_no_second_level_for_another(bench: Bench) -> None:
    media = png(new_image(32, 32))
    asked = [await bench.call(media, salt=salt) for salt in ("a", "a", "b", None, "b")]
    assert [ready.origin for ready in asked] == ["encoded", "cached", "encoded", "encoded", "cached"]
    assert len({ready.key for ready in asked}) == len({ready.address for ready in asked}) == 3
    assert bench.pipeline.maker.batcher.items == 3


async def test_salts_join_no_flight_of_each_other(bench: Bench) -> None:
    media = png(new_image(32, 32))
    asked = await asyncio.gather(*(bench.call(media, salt=salt) for salt in ("a", "b", "a", "b")))
    assert [ready.origin for ready in asked] == ["encoded", "encoded", "joined", "joined"]
    assert bench.pipeline.maker.batcher.items == 2


DROPS = ("its key", "its salt", "its image", "everything", "another key", "another salt", "another image")


def drops(bench: Bench, media: bytes) -> dict[str, DropRequest]:
    return {
        "its key": DropRequest(key=bench.key(media, "one")),
        "its image": DropRequest(content=content_digest(media).hex()),
        "its salt": DropRequest(tag=salt_tag("one").hex()),
        "everything": DropRequest(everything=True),
        "another key": DropRequest(key=bench.key(b"other", "one")),
        "another image": DropRequest(content="0" * 64),
        "another salt": DropRequest(tag=salt_tag("two").hex()),
    }


@pytest.mark.parametrize("what", DROPS)
async def test_what_is_stored_is_dropped_and_its_export_stays(bench: Bench, what: str) -> None:
    media = png(new_image(32, 32))
    ready = await bench.call(media, salt="one")
    report = await bench.server.drop(drops(bench, media)[what])
    concerned = "another" not in what
    assert (report.entries, report.nbytes) == ((1, ready.nbytes) if concerned else (0, 0))
    assert bench.manager.peek(ready.key) != concerned
    assert bench.exporter.held == 1
    assert bench.exporter.release(ready.token)
    assert bench.manager.statistics().arena.used_bytes == (0 if concerned else ready.nbytes)


@pytest.mark.parametrize("what", DROPS)
async def test_what_is_being_encoded_when_it_is_dropped_is_delivered_and_not_stored(
    bench: Bench, what: str
) -> None:
    media = png(new_image(32, 32))
    bench.encoder.open.clear()
    call = asyncio.create_task(bench.call(media, salt="one"))
    assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
    assert (await bench.server.drop(drops(bench, media)[what])).entries == 0
    bench.encoder.open.set()
    ready = await call
    assert ready.origin == "encoded"
    assert bench.manager.peek(ready.key) == ("another" in what)
    assert (await bench.call(media, salt="one")).origin == ("cached" if "another" in what else "encoded")


async def test_what_was_found_wrong_is_encoded_anew(bench: Bench) -> None:
    media = png(new_image(32, 32))
    origins = [(await bench.call(media, fresh=fresh)).origin for fresh in (False, True, False)]
    assert origins == ["encoded", "encoded", "cached"]


async def test_more_embeddings_than_the_arena_holds_are_refused_until_one_is_read(bench: Bench) -> None:
    first = await bench.call(png(new_image(32, 32)))
    room = bench.manager.capacity_bytes // first.nbytes - 1
    for _ in range(room):
        await bench.call(png(new_image(32, 32)))
    with pytest.raises(EncodeOverloadedError, match="leased until a PD worker's READ"):
        await bench.call(png(new_image(32, 32)))
    assert bench.exporter.release(first.token)
    assert (await bench.call(png(new_image(32, 32)))).origin == "encoded"


async def test_a_full_queue_refuses_and_what_is_stored_is_still_offered(
    encoder: TransformersVisionEncoder,
) -> None:
    stored, other = png(new_image(32, 32)), png(new_image(32, 32))
    async with running(encoder, max_queued=1) as bench:
        await bench.call(stored)
        bench.encoder.open.clear()
        call = asyncio.create_task(bench.call(png(new_image(32, 32))))
        assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
        with pytest.raises(EncodeOverloadedError, match="vision tower"):
            await bench.call(other)
        assert (await bench.call(stored)).origin == "cached"
        bench.encoder.open.set()
        await call
        assert (await bench.call(other)).origin == "encoded"


async def test_those_that_join_a_flight_are_not_charged(encoder: TransformersVisionEncoder) -> None:
    media = png(new_image(32, 32))
    async with running(encoder, max_queued=1) as bench:
        bench.encoder.open.clear()
        calls = [asyncio.create_task(bench.call(media)) for _ in range(8)]
        async with asyncio.timeout(30):
            while bench.pipeline.flights.waiters < len(calls):
                await asyncio.sleep(0)
        assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
        assert (bench.pipeline.queue.items, bench.pipeline.queue.nbytes) == (1, 0)
        bench.encoder.open.set()
        origins = [ready.origin for ready in await asyncio.gather(*calls)]
        assert origins == ["encoded"] + ["joined"] * 7
        assert bench.pipeline.queue.refused == 0


async def test_an_answer_that_comes_when_the_caller_has_gone_exports_nothing(bench: Bench) -> None:
    media = png(new_image(32, 32))
    assert bench.exporter.release((await bench.call(media)).token)
    context = Context("gone")
    context.stop_generating()
    payload = bench.request(media).model_dump()
    assert [answer async for answer in bench.server.handle(payload, context)] == []
    assert bench.exporter.held == 0


@pytest.mark.parametrize("early", [False, True])
async def test_a_call_that_is_taken_back_ends_without_an_answer_or_an_export(
    bench: Bench, early: bool
) -> None:
    """Also when the small message comes before the large one that it is about."""
    media, context = png(new_image(32, 32)), Context("call-1")
    take_back = EncodeCancel(cancel="call-1").model_dump()

    async def answers(payload: Any, asker: Context) -> list[Any]:
        return [answer async for answer in bench.server.handle(payload, asker)]

    bench.encoder.open.clear()
    if early:
        assert await answers(take_back, Context("a")) == []
    call = asyncio.create_task(answers(bench.request(media).model_dump(), context))
    if not early:
        assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
        assert await answers(take_back, Context("b")) == []
    async with asyncio.timeout(30):
        assert await call == []
    bench.encoder.open.set()
    assert bench.exporter.exported == 0
    assert (await bench.call(media)).origin == "encoded", (
        "the next call of that id, or of any other, is served"
    )
    assert len(await answers(bench.request(media).model_dump(), Context("call-1"))) == 1


async def test_images_are_prepared_when_there_is_room_and_wait_as_files_until_then(
    encoder: TransformersVisionEncoder,
) -> None:
    """The room is full with one image, so that no two are ever in one batch."""
    files = [png(new_image(32, 32)) for _ in range(4)]
    async with running(encoder, max_prepared_mb=1 / MB, preprocess_threads=1) as bench:
        pipeline = bench.pipeline
        bench.encoder.open.clear()
        calls = [asyncio.create_task(bench.call(files[0]))]
        assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
        one = pipeline.maker.room.nbytes
        assert one > 0
        assert pipeline.queue.nbytes == 0, "its file is not held any more"
        calls += [asyncio.create_task(bench.call(file)) for file in files[1:]]
        async with asyncio.timeout(30):
            while pipeline.queue.items < len(files):
                await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(
            pipeline.maker.threads, lambda: None
        )  # what it had to do
        assert (pipeline.maker.room.nbytes, pipeline.queue.nbytes) == (one, sum(map(len, files[1:])))
        bench.encoder.open.set()
        await asyncio.gather(*calls)
        assert (pipeline.maker.room.nbytes, pipeline.queue.nbytes) == (0, 0)
        assert (pipeline.maker.batcher.items, pipeline.maker.batcher.batches) == (len(files), len(files))
