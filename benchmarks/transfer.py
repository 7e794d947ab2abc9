"""From the encode worker's reply to a committed embedding, beside a memcpy of its bytes.

    python -m benchmarks.transfer [--peer FOLDER] [--before CHECKOUT] [--two-hosts] [--repeats 12]

Two processes. Ours are the real encode worker and the PD worker's real loader, without a model, with
`--transfer auto` (`ours`) and `nixl` (`ours_nixl`; `ours_tcp` with TCP in place of shared memory).
`committed` is the time from the reply in hand (parse, reserve, copy or READ, checksum and check for NaN,
commit) to a lease on the entry. `before` is what the encode side does between the end of its vision tower
and the reply: a copy into its arena and the checksum. `unchecked` is the same READ by a reader, of this
benchmark alone, that looks at no byte: what the checks cost. As root the first two run with large pages too,
in a `/dev/shm` of their own. With `--before`, another checkout of this repository (`git worktree add FOLDER
COMMIT`), its `ours` runs too.

With `--peer`, the folder in which `make bench-transfer` puts ai-dynamo, Dynamo's senders and receivers run
beside it. `before` is their `send_embeddings` (`local` writes a file there), `received` their
`receive_embeddings`, from the reply in hand to the tensor that it returns, and `committed` includes the clone
of it that Dynamo's prefill worker puts into its cache. None of theirs looks at the bytes. All caches have the
same size and fill up.

Each round starts a new pair of processes for each way, in an order drawn anew; only one pair is there at a
time, because some burn a core while they wait. With `--two-hosts` each process is in a network namespace of
its own and UCX goes by TCP (root; `local` needs a common disk and is left out). What became of each goal is
said below the table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measuring import finish, median_ms
from benchmarks.transfer_dynamo import FOLDER_VARIABLE, KINDS
from benchmarks.transfer_ends import MB
from benchmarks.transfer_ways import Way, large_pages, ways_of
from benchmarks.two_hosts import Host, two_hosts

SIZES = {"1 MB": MB, "10 MB": 10 * MB, "34 MB": 34 * MB}
WARM_UP = 3
GOALS = {"ours": (1.5, 0.4), "ours_nixl": (4.0, 0.4)}
"""Memcpys and milliseconds beside them, from the reply to the committed entry, on one host."""
FASTER_THAN_LOCAL = 2.0

STAGES = ("received", "committed", "whole")
ANSWER_TIMEOUT_S = 120

Measured = dict[str, dict[str, list[dict[str, float]]]]


class Pair:
    """A sender and a receiver of one way, each in a process of its own."""

    def __init__(self, name: str, way: Way, hosts: Sequence[Host], folder: Path) -> None:
        self._name = name
        self._way = way
        self._hosts = hosts
        self._socket = folder / f"{name}.socket"
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Pair:
        await self._start("send", "listening", 0)
        await self._start("receive", "connected", 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in reversed(self._processes):  # the receiver's end is the sender's
            if process.stdin is not None:
                process.stdin.close()
            try:
                async with asyncio.timeout(20):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def measure(self, nbytes: int, repeats: int) -> list[dict[str, float]]:
        """Return the seconds of each of `repeats` embeddings."""
        receiver = self._processes[1]
        if receiver.stdin is None:
            raise RuntimeError("the receiver was started without stdin")
        receiver.stdin.write(f"{nbytes} {repeats}\n".encode())
        seconds: list[dict[str, float]] = json.loads(await self._line(receiver))
        return seconds

    async def _start(self, end: str, ready: str, number: int) -> None:
        host = self._hosts[number] if self._hosts else None
        process = await asyncio.create_subprocess_exec(
            *self._way.command(end, self._way.end, str(self._socket), host=host),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._way.folder,
            env=self._way.variables(host),
        )
        self._processes.append(process)
        while (await self._line(process)).strip() != ready:
            pass  # libraries print on the way

    async def _line(self, process: asyncio.subprocess.Process) -> str:
        if process.stdout is None:
            raise RuntimeError("the process was started without stdout")
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of {self._name} ended early; its last words are above")
        return line.decode()


async def measure(ways: Mapping[str, Way], hosts: Sequence[Host], rounds: int, repeats: int) -> Measured:
    """Measure every way in every round; return for each way and size what each transfer took."""
    source = random.Random(1)
    measured: Measured = {way: {name: [] for name in SIZES} for way in ways}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=rounds * len(ways) * len(SIZES)) as bar:
        for _ in range(rounds):
            for way in source.sample(list(ways), len(ways)):
                bar.set_description(way)
                async with Pair(way, ways[way], hosts, Path(folder)) as pair:
                    for name, nbytes in SIZES.items():
                        await pair.measure(nbytes, WARM_UP)
                        measured[way][name] += await pair.measure(nbytes, repeats)
                        bar.update()
    return measured


def summary(measured: Measured) -> dict[str, Any]:
    """Return medians in milliseconds by size, and how they stand to the goals."""
    sizes: dict[str, Any] = {}
    for name in SIZES:
        own = next(iter(measured))
        ours = measured[own][name]
        memcpy = median_ms([one["memcpy_s"] for way in measured.values() for one in way[name]])
        ways = {way: _medians(by_size[name]) for way, by_size in measured.items()}
        mine = ways[own]
        others = {way: row for way, row in ways.items() if way != own}
        sizes[name] = {
            "memcpy_ms": memcpy,
            "ways": ways,
            "goal_ms": round(GOALS[own][0] * memcpy + GOALS[own][1], 3),
            "ours_in_memcpys": round(mine["committed_ms"] / memcpy, 2),
            "quartiles_ms": [
                round(1e3 * cut, 3) for cut in statistics.quantiles([one["commit_s"] for one in ours])
            ],
            "times_faster": {
                way: {key: round(row[f"{key}_ms"] / mine[f"{key}_ms"], 2) for key in STAGES}
                for way, row in others.items()
            },
            "goals": list(goals(memcpy, ways)),
        }
    return sizes


def goals(memcpy_ms: float, ways: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield what became of each goal at one size: our ways on one host, and the checks over TCP.

    The checks cost nothing that can be seen when the median with them lies within the quartiles without.
    """
    for name, row in ways.items():
        memcpys, beside = GOALS.get(name.removesuffix("_large_pages"), (0.0, 0.0))
        if memcpys and "ours" in ways:
            limit = memcpys * memcpy_ms + beside
            yield _goal(f"{name} <= {memcpys:g} memcpys + {beside:g} ms", row["committed_ms"], limit)
    if "local" in ways and "ours" in ways:
        limit = ways["local"]["committed_ms"] / FASTER_THAN_LOCAL
        yield _goal("ours twice as fast as Dynamo's local", ways["ours"]["committed_ms"], limit)
    for name, unchecked in ways.items():
        checked = name.removesuffix("_unchecked")
        if checked != name:
            limit = unchecked["third_quartile_ms"]
            yield _goal(f"{checked}: checks not to be seen", ways[checked]["committed_ms"], limit)


def _goal(name: str, found_ms: float, limit_ms: float) -> dict[str, Any]:
    return {"goal": name, "ms": found_ms, "limit_ms": round(limit_ms, 3), "met": found_ms <= limit_ms}


def _medians(transfers: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "before_ms": median_ms([one["send_s"] for one in transfers]),
        "received_ms": median_ms([one["receive_s"] for one in transfers]),
        "committed_ms": median_ms([one["commit_s"] for one in transfers]),
        "whole_ms": median_ms([one["send_s"] + one["commit_s"] for one in transfers]),
        "third_quartile_ms": round(1e3 * statistics.quantiles([one["commit_s"] for one in transfers])[2], 3),
    }


def table(sizes: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table for the terminal."""
    yield "ms: committed (before the reply)"
    yield f"{'':>24} " + " ".join(f"{size:>18}" for size in sizes)
    yield f"{'memcpy':>24} " + " ".join(f"{row['memcpy_ms']:>18.3f}" for row in sizes.values())
    for way in next(iter(sizes.values()))["ways"]:
        rows = [row["ways"][way] for row in sizes.values()]
        cells = (f"{row['committed_ms']:>8.2f} ({row['before_ms']:>7.2f})" for row in rows)
        yield f"{way:>24} " + " ".join(cells)
    for size, row in sizes.items():
        for goal in row["goals"]:
            verdict = "met" if goal["met"] else "MISSED"
            yield f"{size:>7} {goal['goal']}: {goal['ms']:.2f} of {goal['limit_ms']:.2f} ms, {verdict}"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer", type=Path, metavar="FOLDER", help="where ai-dynamo lies; default: ours alone"
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="another checkout, measured in the same run"
    )
    parser.add_argument("--two-hosts", action="store_true", help="network namespaces and TCP; needs root")
    parser.add_argument("--ways", help="the names of some, ours first; default: all that can run here")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes for each way")
    parser.add_argument("--repeats", type=int, default=12, help="embeddings of each size in a round")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    options = parser.parse_args()
    dynamo: tuple[str, ...] = ()
    if options.peer is not None:
        os.environ[FOLDER_VARIABLE] = str(options.peer.resolve())
        dynamo = tuple(KINDS)
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(two_hosts()) if options.two_hosts else ()
        pages = None if options.two_hosts else stack.enter_context(large_pages())
        ways = ways_of(two_hosts=options.two_hosts, before=options.before, dynamo=dynamo, large_pages=pages)
        if options.ways:
            ways = {name: ways[name] for name in options.ways.split(",")}
        measured = asyncio.run(measure(ways, hosts, options.rounds, options.repeats))
    sizes = summary(measured)
    print("\n".join(table(sizes)))
    results = {"two_hosts": options.two_hosts, "rounds": options.rounds, "repeats": options.repeats}
    finish("transfer", {**results, "sizes": sizes}, options.out)


if __name__ == "__main__":
    main()
