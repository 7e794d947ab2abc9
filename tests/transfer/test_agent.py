"""The NIXL agent's own contract, its environment and its import."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.transfer.conftest import PdSide, until
from trtllm_mm_cache.errors import ConfigurationError, TransferError, TransferTimeoutError
from trtllm_mm_cache.transfer import Export, TransferAgent
from trtllm_mm_cache.transfer.environment import check_transports, load_nixl, prepare_environment

SOURCES = Path(__file__).parents[2]


async def test_metadata_needs_a_region_and_is_final_once_read(pd_side: PdSide) -> None:
    agent = await TransferAgent.start()
    try:
        with pytest.raises(ConfigurationError, match="no memory is registered"):
            _ = agent.metadata
        arena = pd_side.manager.arena
        half = arena.capacity_bytes // 2
        await agent.register(arena.base_address, half)
        for address, nbytes in [
            (arena.base_address, 64),
            (arena.base_address + half - 1, 64),
            (arena.base_address - 64, arena.capacity_bytes),
        ]:
            with pytest.raises(ConfigurationError, match="overlaps"):
                await agent.register(address, nbytes)
        with pytest.raises(ConfigurationError, match="empty"):
            await agent.register(arena.base_address + half, 0)
        await agent.register(arena.base_address + half, 64)
        assert agent.metadata == agent.metadata
        assert agent.metadata.agent_name == agent.name
        with pytest.raises(ConfigurationError, match="metadata"):
            await agent.register(arena.base_address + half + 64, 64)
    finally:
        await agent.close(deadline_s=1)


async def test_close_is_idempotent_and_refuses_what_comes_later() -> None:
    agent = await TransferAgent.start()
    assert agent.is_alive
    await asyncio.gather(agent.close(deadline_s=1), agent.close(deadline_s=1))
    await agent.close(deadline_s=1)
    assert not agent.is_alive
    with pytest.raises(TransferError, match="closed"):
        agent.call(lambda nixl: None)
    # The thread has done everything when it says that it has ended; it is gone a moment later.
    await until(lambda: not any(thread.name == "nixl-agent" for thread in threading.enumerate()))


async def test_work_can_be_cancelled_until_it_starts_and_its_error_is_the_callers(pd_side: PdSide) -> None:
    gate = threading.Event()
    blocker = pd_side.agent.call(lambda nixl: gate.wait(10))
    queued: Future[int] = pd_side.agent.call(lambda nixl: 1)
    failing = pd_side.agent.call(lambda nixl: 1 // 0)
    assert queued.cancel()
    gate.set()
    assert await asyncio.wrap_future(blocker) is True
    with pytest.raises(ZeroDivisionError):
        await asyncio.wrap_future(failing)
    assert pd_side.agent.is_alive


async def test_a_read_whose_deadline_passes_in_the_queue_is_never_begun(pd_side: PdSide) -> None:
    gate = threading.Event()
    blocker = pd_side.agent.call(lambda nixl: gate.wait(10))
    export = Export("token", address=1, nbytes=1, checksum=0)
    read = pd_side.reader.begin(pd_side.agent.metadata, export, 1, deadline_s=0.01)
    await asyncio.sleep(0.02)
    gate.set()
    await asyncio.wrap_future(blocker)
    with pytest.raises(TransferTimeoutError, match="before its turn"):
        await asyncio.wrap_future(read.outcome)
    assert read.settled.done()
    pd_side.assert_nothing_leaked()


async def test_an_idle_agent_costs_little_cpu(pd_side: PdSide) -> None:
    def thread_seconds(_: object) -> float:
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return usage.ru_utime + usage.ru_stime

    began, before = time.monotonic(), await asyncio.wrap_future(pd_side.agent.call(thread_seconds))
    await asyncio.sleep(1)
    used = await asyncio.wrap_future(pd_side.agent.call(thread_seconds)) - before
    assert used < 0.1 * (time.monotonic() - began)


def test_settings_win_over_the_environment_which_wins_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TCP_TX_SEG_SIZE", "32k")
    monkeypatch.setenv("UCX_TLS", "all")
    monkeypatch.delenv("UCX_TCP_RX_SEG_SIZE", raising=False)
    monkeypatch.delenv("NIXL_LOG_LEVEL", raising=False)
    prepare_environment({"UCX_TLS": "tcp"})
    assert os.environ["UCX_TCP_TX_SEG_SIZE"] == "32k"
    assert os.environ["UCX_TLS"] == "tcp"
    assert os.environ["UCX_TCP_RX_SEG_SIZE"] == "64k"
    assert os.environ["NIXL_LOG_LEVEL"] == "WARN"
    with pytest.raises(ConfigurationError, match="'PATH'"):
        prepare_environment({"PATH": "anything"})


@pytest.mark.parametrize("driver", [True, False])
async def test_a_choice_that_nixl_refuses_on_a_gpu_host_is_reported_with_the_way_out(
    driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr("trtllm_mm_cache.transfer.environment._NVIDIA_DRIVER", device)
    if driver:
        device.touch()
    for choice in ("tcp,cuda_copy", "all", "cuda,tcp", "^rc"):
        monkeypatch.setenv("UCX_TLS", choice)
        check_transports()
    monkeypatch.setenv("UCX_TLS", "tcp,posix")
    if not driver:
        check_transports()
        return
    with pytest.raises(ConfigurationError, match="set UCX_TLS=tcp,posix,cuda_copy"):
        await TransferAgent.start()


@pytest.mark.skipif(find_spec("nixl_cu12") is None, reason="the wheel nixl_cu12 is not installed")
def test_the_flavour_follows_the_loaded_torch() -> None:
    # A process of its own, because NIXL loads in one flavour only: what is loaded stays in use.
    done = run_python(
        "import torch",
        "from trtllm_mm_cache.transfer.environment import load_nixl",
        "torch.version.cuda = '12.8'",
        "print(load_nixl().module.__name__)",
        "torch.version.cuda = '13.0'",
        "print(load_nixl().module.__name__)",
    )
    assert (done.stdout, done.stderr) == ("nixl_cu12\nnixl_cu12\n", "")


def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"nixl_cu13.*nixl_cu12.*install"):
        load_nixl()


def test_a_process_that_forgets_to_close_still_exits_in_order() -> None:
    done = run_python(
        "import asyncio",
        "from trtllm_mm_cache.transfer import Export, TransferAgent",
        "agent = asyncio.run(TransferAgent.start())",
        "def stay_in_nixl(nixl):",
        "    for _ in range(200):",
        "        nixl.get_new_notifs()",
        "    if agent.is_alive:",
        "        agent.call(stay_in_nixl)",
        "agent.call(stay_in_nixl)",
        "agent.call(stay_in_nixl)",
        "print(agent.is_alive)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
