"""Runs AIPerf, NVIDIA's load generator, and reads what it exports.

It lives in a virtual environment of its own (1.2 GB, `make bench-serving` makes it) and is a process here.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# AIPerf takes a local tokenizer only while this is unset; a PYTHONPATH is meant for us.
_NOT_PASSED_ON = ("HF_HUB_OFFLINE", "PYTHONPATH")


@dataclass(frozen=True)
class LoadRun:
    """What AIPerf measured. `ttft_ms` is by the request's place in the file; those that failed have none."""

    ttft_ms: dict[int, float]
    requests_per_s: float
    output_tokens_per_s: float
    version: str


def profile(
    aiperf: Path,
    *,
    url: str,
    model: str,
    tokenizer: Path,
    requests: Path,
    count: int,
    concurrency: int,
    output_tokens: int,
    folder: Path,
    timeout_s: float,
) -> LoadRun:
    """Send the requests of a `single_turn` file in order, `concurrency` at a time, and stream the answers.

    Raises `SystemExit` with AIPerf's last words when it fails or when a request does.
    """
    command = [
        *(str(aiperf), "profile", "-m", model, "--url", url, "--endpoint-type", "chat", "--streaming"),
        *("--input-file", str(requests), "--custom-dataset-type", "single_turn"),
        *("--dataset-sampling-strategy", "sequential", "--concurrency", str(concurrency)),
        *("--request-count", str(count), "--tokenizer", str(tokenizer), "--use-server-token-count"),
        *("--extra-inputs", f"max_tokens:{output_tokens}", "--extra-inputs", "ignore_eos:true"),
        *("--ui", "none", "--artifact-dir", str(folder), "--random-seed", "1"),
        # One process of each kind: a small machine must serve the model as well.
        *("--workers-max", "1", "--record-processors", "1", "--no-gpu-telemetry", "--no-server-metrics"),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"AIPerf failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
    run = read_export(folder)
    if len(run.ttft_ms) != count:
        raise SystemExit(f"AIPerf measured {len(run.ttft_ms)} of {count} requests; see {folder}")
    return run


def read_export(folder: Path) -> LoadRun:
    """Read the files that AIPerf leaves in its artifact folder; requests that failed are left out."""
    summary: dict[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text())
    records = [json.loads(line) for line in (folder / "profile_export.jsonl").read_text().splitlines()]
    return LoadRun(
        ttft_ms={
            record["metadata"]["session_num"]: record["metrics"]["time_to_first_token"]["value"]
            for record in records
            if "time_to_first_token" in record["metrics"]
        },
        requests_per_s=summary["request_throughput"]["avg"],
        output_tokens_per_s=summary["output_token_throughput"]["avg"],
        version=summary["aiperf_version"],
    )
