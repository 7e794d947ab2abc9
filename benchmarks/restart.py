"""From a PD worker's start to its being ready: by itself, and warm under `serve`.

    python -m benchmarks.restart [--rounds 5] [--baseline CHECKOUT]

Three ways in turn, so that a busy machine is busy for all of them: `baseline`, a worker by itself of another
checkout; `cold`, one of this checkout; `warm`, one that was killed under `serve` and is started again (from
the start on, as `serve` says it: what it may wait before that is not counted). The demo model, a cache of
0.25 GB. Nothing but the process's own log is read. The last line is one JSON object, in seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.measuring import finish
from tests.e2e.stack import REPOSITORY, Stack, launched, wait_until

MODEL = REPOSITORY / "models/shapes-qwen2-vl"
OPTIONS = ("--multimodal-embedding-cache-capacity-gb", "0.25")
TIMEOUT_S = 120
AGAIN = re.compile(r"PD worker 1 is ready again, (\d+\.\d) s after its start")


def by_itself(checkout: Path, folder: Path) -> float:
    """Start a PD worker of `checkout`; return the seconds until it says that it is ready."""
    log = folder / "pd.log"
    command = [sys.executable, "-m", "trtllm_mm_cache.cli", "pd", "--model-path", str(MODEL), *OPTIONS]
    command += ["--extra-engine-args", str(checkout / "configs/cpu-demo/pd.yaml")]
    variables = {"DYN_FILE_KV": str(folder / "discovery"), "PYTHONPATH": str(checkout), "DYN_LOG": "warn"}
    with log.open("wb") as output:
        began = time.perf_counter()
        worker = subprocess.Popen(
            command, env={**os.environ, **variables}, cwd=checkout, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_until(lambda: b"PD worker ready" in log.read_bytes(), TIMEOUT_S, "the worker was not ready")
            return time.perf_counter() - began
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(TIMEOUT_S)


def warm(stack: Stack) -> float:
    """Kill the PD worker of a stack; return the seconds from the new one's start until it is ready."""
    before = len(AGAIN.findall(stack.log.read_text()))
    os.kill(stack.workers("PD")[0].pid, signal.SIGKILL)
    wait_until(lambda: len(AGAIN.findall(stack.log.read_text())) > before, TIMEOUT_S, "it did not come back")
    return float(AGAIN.findall(stack.log.read_text())[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each way (default: %(default)s)")
    parser.add_argument("--baseline", type=Path, help="another checkout, to compare with")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as name,
        launched(Path(name) / "run", *OPTIONS, MODEL_PATH=str(MODEL)) as stack,
    ):
        for number in range(arguments.rounds):
            for way, checkout in (("baseline", arguments.baseline), ("cold", REPOSITORY)):
                if checkout is not None:
                    folder = Path(name) / f"{way}-{number}"
                    folder.mkdir()
                    seconds[way].append(by_itself(checkout.resolve(), folder))
            seconds["warm"].append(warm(stack))
    result = {
        way: {"median": round(statistics.median(each), 2), "all": [round(value, 2) for value in each]}
        for way, each in seconds.items()
    }
    finish("restart", {"rounds": arguments.rounds, "seconds": result})


if __name__ == "__main__":
    main()
