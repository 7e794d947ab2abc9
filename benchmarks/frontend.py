"""What the frontend costs, beside Dynamo's own: tokens a second, time to first token, processor time.

    python -m benchmarks.frontend [--rounds 5] [--tokens 128]

One worker on the PD workers' interface that computes nothing and answers as fast as it can; both frontends in
processes of their own before it, asked in turn by streams of 1, 16 and 64 requests at a time. The last line
is one JSON object: medians, and the ratio ours to Dynamo's round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import finish, median_ratio, say
from tests.e2e.stack import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "models/shapes-qwen2-vl"
CONCURRENCY = (1, 16, 64)
FIGURES = ("tokens_s", "first_token_ms", "cpu_us_a_token")


async def answer(admit: Callable[[Any], Any], payload: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
    """Answer with as many tokens as asked for, one a message, at once."""
    del context
    if proof := admit(payload):
        yield proof
    prompt_tokens, count = len(payload["token_ids"]), payload["stop_conditions"]["max_tokens"]
    for number in range(1, count + 1):
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": number,
            "total_tokens": prompt_tokens + number,
        }
        end = {"finish_reason": "length"} if number == count else {}
        yield {"token_ids": [100 + number % 50], "completion_usage": usage, **end}
        await asyncio.sleep(0)


async def serve_worker() -> None:
    """Serve as a PD worker that registers with both frontends."""
    from trtllm_mm_cache.runtime.connect import connect, endpoint_path
    from trtllm_mm_cache.runtime.model import offer_model
    from trtllm_mm_cache.settings import DEFAULT_PD_ENDPOINT, DiscoverySettings

    runtime, members = connect(DiscoverySettings())
    endpoint = runtime.endpoint(endpoint_path(DEFAULT_PD_ENDPOINT))
    await offer_model(endpoint, str(MODEL), MODEL.name)
    admit = partial(members.admit, endpoint.connection_id(), required=False)
    await endpoint.serve_endpoint(partial(answer, admit))


async def serve_dynamo(port: int) -> None:
    """Serve Dynamo's own frontend."""
    from dynamo.llm import EngineType, EntrypointArgs, make_engine, run_input

    from trtllm_mm_cache.runtime.connect import connect
    from trtllm_mm_cache.settings import DiscoverySettings

    runtime, _ = connect(DiscoverySettings())
    arguments = EntrypointArgs(EngineType.Dynamic, http_host="127.0.0.1", http_port=port)
    await run_input(runtime, "http", await make_engine(runtime, arguments))


@contextlib.contextmanager
def started(folder: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of the deployment that finds the others in `folder`."""
    environment = os.environ | {"DYN_FILE_KV": folder, "DYN_LOG": "error", "DYN_DISCOVERY_BACKEND": "file"}
    environment.pop("DYN_SYSTEM_PORT", None)
    process = subprocess.Popen([sys.executable, *arguments], env=environment, cwd=REPOSITORY)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the threads of a process have taken."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


async def one_stream(port: int, tokens: int) -> float:
    """Ask for a stream and read it to its end; return the seconds to its first event."""
    body = json.dumps(
        {
            "model": MODEL.name,
            "stream": True,
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": "Where is the yellow cross?"}],
        }
    ).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = (
        "host: x",
        "connection: close",
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    head = "\r\n".join(("POST /v1/chat/completions HTTP/1.1", *headers, "", ""))
    writer.write(head.encode() + body)
    try:
        await reader.readuntil(b"data: ")
        first = time.perf_counter() - began
        await reader.readuntil(b"[DONE]")
    finally:
        writer.close()
    return first


async def wait_ready(port: int) -> None:
    """Wait until a stream comes back."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await one_stream(port, 1)
                return
            await asyncio.sleep(0.2)


def measured(port: int, pid: int, concurrency: int, requests: int, tokens: int) -> dict[str, float]:
    """Return the figures of one round."""

    async def run() -> list[float]:
        turns = asyncio.Semaphore(concurrency)

        async def one() -> float:
            async with turns:
                return await one_stream(port, tokens)

        return await asyncio.gather(*(one() for _ in range(requests)))

    cpu, began = cpu_seconds(pid), time.perf_counter()
    firsts = asyncio.run(run())
    seconds = time.perf_counter() - began
    return {
        "tokens_s": requests * tokens / seconds,
        "first_token_ms": statistics.median(firsts) * 1e3,
        "cpu_us_a_token": (cpu_seconds(pid) - cpu) / (requests * tokens) * 1e6,
    }


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    """Return the medians of both frontends, and the ratios ours to Dynamo's."""
    ports = {"ours": free_port(), "dynamo": free_port()}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        run: Callable[..., Any] = lambda *arguments: running.enter_context(started(folder, *arguments))  # noqa: E731
        run("-m", "benchmarks.frontend", "--worker")
        ours = (
            "-m",
            "trtllm_mm_cache.cli",
            "frontend",
            "--model-path",
            str(MODEL),
            "--http-port",
            str(ports["ours"]),
        )
        pids = {
            "ours": run(*ours).pid,
            "dynamo": run("-m", "benchmarks.frontend", "--dynamo", str(ports["dynamo"])).pid,
        }
        for port in ports.values():
            asyncio.run(wait_ready(port))
        report: dict[str, Any] = {}
        for concurrency in CONCURRENCY:
            requests = max(4, 2 * concurrency)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
            for number in range(rounds + 1):
                for name in sorted(ports, reverse=bool(number % 2)):
                    figures = measured(ports[name], pids[name], concurrency, requests, tokens)
                    if number:
                        found[name].append(figures)
            say(f"{concurrency} at a time: done")
            report[str(concurrency)] = {
                figure: {
                    **{
                        name: round(statistics.median(each[figure] for each in found[name]), 2)
                        for name in ports
                    },
                    "ratio": round(
                        median_ratio(
                            [e[figure] for e in found["ours"]], [e[figure] for e in found["dynamo"]]
                        ),
                        2,
                    ),
                }
                for figure in FIGURES
            }
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dynamo", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(serve_worker())
    elif arguments.dynamo:
        asyncio.run(serve_dynamo(arguments.dynamo))
    else:
        finish("frontend", measure(arguments.rounds, arguments.tokens))


if __name__ == "__main__":
    main()
