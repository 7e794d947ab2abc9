"""Everything that only a GPU shows, part by part, within minutes and with nothing from outside.

    python -m benchmarks.gpu_check [PART ...] [--size 3b] [--seconds 420] [--out FILE]

Each part runs in a process of its own, with its own deadline, and prints its JSON lines as soon as it has
them; they are appended to FILE as well. A part that fails or is late is a line that says so, and the next one
runs. The last line sums up. The parts, in the order in which they run:

    copies     GPU to arena and arena to GPU by size, beside torch's pinned memory and the pageable way
    context    what page-locking costs a process: seconds, its own memory, the GPU's memory
    serve      both of the next two, with the model loaded once
    miss       where the time of a miss goes: decode, preprocess, tower, store, transfer, first token
    ttft       time to the first token, miss, hit and text of equal length; ten images; a burst
    contract   tests/cuda: a hit is a miss to the bit, copies counted, handles of another process
    transfer   `benchmarks.transfer`, ours alone (needs the ai-dynamo wheel)

`serve` and its halves use a random model of `--size` (tiny, 3b, 7b), made once, in /dev/shm where it fits.
On a machine without a GPU they run too, which shows that they work and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.model import SIZES

PARTS: dict[str, tuple[list[str], int]] = {
    "copies": (["benchmarks.gpu_check.copies"], 60),
    "context": (["benchmarks.gpu_check.context"], 60),
    "serve": (["benchmarks.gpu_check.serve", "miss,ttft"], 240),
    "miss": (["benchmarks.gpu_check.serve", "miss"], 150),
    "ttft": (["benchmarks.gpu_check.serve", "ttft"], 200),
    "contract": (["pytest", "-q", "-W", "default", "tests/cuda"], 150),
    "transfer": (["benchmarks.transfer", "--rounds", "2"], 90),
}
"""What each part runs after `python -m`, and its deadline in seconds."""

NEED_MODEL = ("serve", "miss", "ttft")
BY_DEFAULT = ("copies", "context", "serve", "contract", "transfer")


def run(name: str, extra: list[str], deadline_s: float) -> Iterator[dict[str, Any]]:
    """Run a part; yield what it prints, then how it ended."""
    arguments, own_deadline_s = PARTS[name]
    deadline_s = min(deadline_s, own_deadline_s)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            ["timeout", "-k", "5", str(int(deadline_s)), sys.executable, "-m", *arguments, *extra],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if process.stdout is None:
            raise RuntimeError("the part was started without a pipe")
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("{"):
                yield {"part": name, **json.loads(line)}
        status = process.wait()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
        end: dict[str, Any] = {"part": name, "status": status, "seconds": round(time.monotonic() - began, 1)}
        if status:
            end |= {"error": "late" if status == 124 else "failed", "last_words": errors.read()}
        if status or name == "contract":
            end["output"] = "".join(lines)[-2000:]
        yield end


def main() -> None:
    """Parse the command line and run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all, once")
    parser.add_argument("--size", choices=SIZES, default="3b", help="of the model that is served")
    parser.add_argument("--seconds", type=int, default=420, help="deadline of all together")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=_roomy_folder()))
    end_by = time.monotonic() + options.seconds
    failed = []
    try:
        for name in options.parts or BY_DEFAULT:
            extra = [str(folder), options.size] if name in NEED_MODEL else []
            left = end_by - time.monotonic()
            if left < 5:
                _report({"part": name, "error": "no time left"}, options.out)
                failed.append(name)
                continue
            for line in run(name, extra, left):
                _report(line, options.out)
                failed += [name] if "error" in line else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _report({"part": "all", "failed": failed}, options.out)
    sys.exit(bool(failed))


def _roomy_folder() -> str | None:
    """Return /dev/shm where it has room for the largest model and arenas, else None: the usual place."""
    shared = "/dev/shm"  # noqa: S108
    return shared if shutil.disk_usage(shared).free > 40e9 else None


def _report(line: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
