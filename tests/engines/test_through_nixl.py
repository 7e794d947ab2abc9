"""The contract again, over the whole way: encode worker process, request plane, NIXL, arena, lease.

For every architecture a real encode worker (`trtllm-mm-cache encode`) runs in a process of its own;
this process is the PD worker: the product's own resolver, reader, cache and generator.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio
from dynamo.runtime import DistributedRuntime

from tests.e2e.stack import data_url, png
from tests.engines.conftest import Halves, ModelFactory
from tests.engines.contract import (
    ARCHITECTURES,
    Case,
    assert_bit_equal,
    assert_clearly_different,
    assert_logits_are_the_models_own,
    chat_case,
    picture,
    pictures,
    reference_logits,
)
from tests.engines.decoding import until
from tests.pd.bench import asking
from trtllm_mm_cache.pd.memory import PdMemory
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.process import make_resolver
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.pd.resolved import ResolvedItems
from trtllm_mm_cache.runtime.connect import connect
from trtllm_mm_cache.runtime.encode_client import EncodeClient
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.settings import PdSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Bounds for a machine that does other work too: a start imports torch and transformers in a new process, and
# what one architecture leaves behind is waited for in the setup of the next one's first test.
READY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60


@dataclass
class Encoders:
    """Encode worker processes, one an architecture; the next one's start overlaps with the current test."""

    model_of: ModelFactory
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, architecture: str) -> None:
        if architecture in self.processes:
            return
        args = self.folder / "encode.yaml"
        args.write_text("device: cpu\ntorch_threads: 1\n")
        command = [sys.executable, "-m", "trtllm_mm_cache.cli", "encode", "--max-batch-images", "1"]
        command += ["--model-path", str(self.model_of(architecture)), "--extra-engine-args", str(args)]
        command += [
            "--multimodal-embedding-cache-capacity-gb",
            "0.0625",
            "--endpoint",
            endpoint(architecture),
        ]
        with (self.folder / f"{architecture}.log").open("wb") as log:
            self.processes[architecture] = subprocess.Popen(command, stdout=log, stderr=log)

    def assert_running(self, architecture: str) -> None:
        assert self.processes[architecture].poll() is None, self.output(architecture)

    def stop(self, architecture: str) -> None:
        process = self.processes.pop(architecture)
        process.terminate()
        assert process.wait(STOP_TIMEOUT_S) == 0, self.output(architecture)

    def output(self, architecture: str) -> str:
        return (self.folder / f"{architecture}.log").read_text()

    def kill_all(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@dataclass
class PdSide:
    """What a PD worker has, for one architecture."""

    halves: Halves
    memory: PdMemory
    resolver: ItemResolver

    async def resolve(self, case: Case) -> ResolvedItems:
        """Send the case's images the way of a request's items."""
        references = [data_url(png(image)) for image in case.images]
        return await self.resolver.resolve(
            asking(references, processor_kwargs=case.processor_kwargs),
            variant=self.halves.generator.variant(len(case.images)),
        )


def endpoint(architecture: str) -> str:
    return f"dyn://contract.{architecture}.encode"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def joined(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[DistributedRuntime, Membership]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYN_FILE_KV", str(tmp_path_factory.mktemp("discovery")))
        patch.setenv("DYN_LOG", "warn")
        before = dict(os.environ)
        runtime, members = connect(PdSettings(model_path="."))
        yield runtime, members
        runtime.shutdown()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def encoders(
    joined: tuple[DistributedRuntime, Membership],
    model_of: ModelFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Encoders]:
    encoders = Encoders(model_of, tmp_path_factory.mktemp("encoders"))
    yield encoders
    encoders.kill_all()


@pytest_asyncio.fixture(params=ARCHITECTURES, loop_scope="module", scope="module")
async def pd_side(
    request: pytest.FixtureRequest,
    joined: tuple[DistributedRuntime, Membership],
    encoders: Encoders,
    halves_of: Callable[[str], Halves],
) -> AsyncIterator[PdSide]:
    architecture = request.param
    position = ARCHITECTURES.index(architecture)
    encoders.start(architecture)
    halves = halves_of(architecture)
    settings = PdSettings(
        model_path=str(halves.model_dir), multimodal_embedding_cache_capacity_gb=0.0625, transfer_arena_mb=1
    )
    runtime, members = joined
    client = await runtime.endpoint(endpoint(architecture).removeprefix("dyn://")).client()
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not client.instance_ids():
            encoders.assert_running(architecture)
            await asyncio.sleep(0.05)
    for following in ARCHITECTURES[position + 1 : position + 2]:
        encoders.start(following)
    memory = await PdMemory.create(settings)
    resolver = make_resolver(settings, memory, EncodeClient(client, members), halves.generator, PdMetrics())
    yield PdSide(halves, memory, resolver)
    await resolver.close()
    memory.cache.check_integrity()
    # The computing thread drops its views a moment after it has handed the last logits over.
    await until(lambda: memory.cache.statistics().leased_bytes == 0)
    statistics = memory.cache.statistics()
    assert (statistics.leased_bytes, statistics.reservations, statistics.quarantined) == (0, 0, 0)
    await memory.close()
    encoders.stop(architecture)


@pytest.mark.parametrize("count", [1, 3])
async def test_logits_are_the_models_own(pd_side: PdSide, count: int) -> None:
    case = chat_case(pd_side.halves.model_dir, pictures(count))
    for seen_before in (False, True):
        images = await pd_side.resolve(case)
        assert not seen_before or images.hits == count
        assert_logits_are_the_models_own(pd_side.halves.generator, case, images.leases)
        images.release()


async def test_what_arrives_is_what_was_encoded(pd_side: PdSide) -> None:
    """Bytes and metadata are those of an encoder in this process; the grid and the expansion among them."""
    case = chat_case(pd_side.halves.model_dir, [picture(7, 90, 120)])
    images = await pd_side.resolve(case)
    (lease,) = images.leases
    encoded = pd_side.halves.encode(case.items(pd_side.halves.generator.variant(1))[0])
    assert_bit_equal(lease.tensor, encoded.tensor)
    assert lease.metadata.encode_seconds > 0
    assert replace(lease.metadata, encode_seconds=0.0, checksum=None) == encoded.metadata
    images.release()


async def test_another_image_and_swapped_images_show(pd_side: PdSide) -> None:
    generator = pd_side.halves.generator
    first, second = picture(1, 120, 80), picture(5, 120, 80)
    alone = chat_case(pd_side.halves.model_dir, [first])
    other = await pd_side.resolve(chat_case(pd_side.halves.model_dir, [second]))
    assert_clearly_different(generator.prefill_logits(alone.request, other.leases), reference_logits(alone))
    pair = chat_case(pd_side.halves.model_dir, [first, second])
    swapped = await pd_side.resolve(chat_case(pd_side.halves.model_dir, [second, first]))
    assert_clearly_different(generator.prefill_logits(pair.request, swapped.leases), reference_logits(pair))
    release_all([other, swapped])


async def test_the_same_image_twice_in_one_prompt_is_one_encode(pd_side: PdSide) -> None:
    image = picture(11, 100, 100)
    case = chat_case(pd_side.halves.model_dir, [image, image])
    before = pd_side.memory.reader.completed_bytes
    images = await pd_side.resolve(case)
    assert images.misses == 1
    assert images.leases[0].address == images.leases[1].address
    assert pd_side.memory.reader.completed_bytes - before == images.leases[0].nbytes
    assert_logits_are_the_models_own(pd_side.halves.generator, case, images.leases)
    images.release()


def release_all(resolved: Sequence[ResolvedItems]) -> None:
    for images in resolved:
        images.release()
