"""What an operator does with a running deployment: logs, traces and `drop`.

Two PD workers and two encode workers, everything logged at DEBUG as JSON, spans sent to a collector here.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.collector import Collector, Received, collector
from tests.e2e.image_server import ImageServer
from tests.e2e.stack import Process, Stack, data_url, launched, message, new_image, png, wait_until

QUESTION = "What is this?"
ENTRIES = "dynamo_component_embedding_cache_entries"


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, traces: Collector) -> Iterator[Stack]:
    with launched(
        tmp_path_factory.mktemp("operations") / "run",
        *("--multimodal-embedding-cache-capacity-gb", "0.03125", "--log-level", "DEBUG"),
        "--allow-private-addresses",
        MODEL_PATH=str(model_dir),
        PD_WORKERS="2",
        ENCODE_WORKERS="2",
        ENCODE_EXTRA_ARGS="--log-level DEBUG --multimodal-embedding-cache-capacity-gb 0.03125",
        MM_CACHE_LOG_FORMAT="json",
        OTEL_EXPORT_ENABLED="1",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{traces.port}",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as running:
        yield running


def workers(stack: Stack) -> list[Process]:
    return [*stack.workers("PD"), *stack.workers("encode")]


def command(
    stack: Stack, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line against the stack's discovery."""
    return command_in(stack.run_dir / "discovery", *arguments, stdin=stdin, **environment)


def command_in(
    discovery: Path, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line with a folder of discovery."""
    return subprocess.run(
        [sys.executable, "-m", "trtllm_mm_cache.cli", *arguments],
        env={**os.environ, "DYN_FILE_KV": str(discovery), **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines_of(process: Process) -> list[dict[str, Any]]:
    """Every line of its log: Dynamo's own are JSON too."""
    return [json.loads(line) for line in process.log.read_text().splitlines()]


def request_lines(stack: Stack) -> list[dict[str, Any]]:
    return [
        line
        for process in stack.workers("PD")
        for line in lines_of(process)
        if line["message"].startswith("request ") and line["level"] != "DEBUG"
    ]


def ask_both(stack: Stack, *parts: Any, **options: Any) -> None:
    """Ask until both PD workers have the picture: at once, for one by one it always goes to the same."""
    before = [worker.metric(ENTRIES) for worker in stack.workers("PD")]

    def both_have() -> bool:
        with ThreadPoolExecutor(12) as clients:
            for asked in [clients.submit(stack.ask, *parts, max_tokens=1, **options) for _ in range(12)]:
                asked.result()
        now = [worker.metric(ENTRIES) for worker in stack.workers("PD")]
        return all(count > old for count, old in zip(now, before, strict=True))

    wait_until(both_have, 30, "one PD worker got no request")


def entries(stack: Stack) -> list[float]:
    return [worker.metric(ENTRIES) for worker in workers(stack)]


def test_one_line_a_request_with_its_numbers(stack: Stack) -> None:
    before = len(request_lines(stack))
    picture = new_image()
    stack.ask(picture, new_image(), QUESTION, max_tokens=3)
    with pytest.raises(openai.APIStatusError):
        stack.ask("data:image/png;base64,AAAA", QUESTION)
    wait_until(lambda: len(request_lines(stack)) == before + 2, 5, "there are not two lines")
    by_outcome = {line["outcome"]: line for line in request_lines(stack)[-2:]} | {
        line["outcome"]: line for line in request_lines(stack) if line["outcome"] == "failed"
    }
    served, failed = by_outcome["served"], by_outcome["failed"]
    assert (served["level"], failed["level"]) == ("INFO", "WARNING")
    assert (served["images"], served["hits"], served["misses"]) == (2, 0, 2)
    assert served["bytes"] > 0
    assert [len(key) for key in served["keys"]] == [64, 64]
    assert 0 < served["images_s"] <= served["first_token_s"] <= served["total_s"]
    assert served["request_id"] != failed["request_id"]
    assert failed["code"] == "unsupported_media"
    assert served["trace_id"] != failed["trace_id"]


def test_the_spans_of_a_request_are_one_trace_through_all_processes(stack: Stack, traces: Collector) -> None:
    trace_id, parent_id = secrets.token_hex(16), secrets.token_hex(8)
    stack.ask(new_image(), QUESTION, extra_headers={"traceparent": f"00-{trace_id}-{parent_id}-01"})
    ours = ("trtllm-mm-cache-pd", "trtllm-mm-cache-encode")
    names = {
        *("request", "references", "fetch", "key", "lookup", "encode_call", "reserve", "transfer"),
        *("commit", "generate", "encode_request", "preprocess", "encode", "store"),
    }

    def mine() -> dict[str, Received]:
        return {span.name: span for span in traces.spans(trace_id) if span.service in ours}

    wait_until(lambda: names <= mine().keys(), 15, "not all spans came")
    spans = mine()
    by_id = {span.span_id: span.name for span in traces.spans(trace_id)}
    for name in ("references", "fetch", "key", "lookup", "generate"):
        assert by_id[spans[name].parent_id] == "request", name
    for name in ("encode_call", "reserve", "transfer", "commit"):
        assert by_id[spans[name].parent_id] == "lookup", name
        assert spans[name].service == "trtllm-mm-cache-pd"
    assert by_id[spans["encode_request"].parent_id] == "encode_call"
    for name in ("preprocess", "encode", "store"):
        assert by_id[spans[name].parent_id] == "encode_request", name
        assert spans[name].service == "trtllm-mm-cache-encode"
    assert spans["request"].attributes["misses"] == "1"


def logs_at_debug(process: Process) -> bool:
    return '"level": "DEBUG"' in process.log.read_text()


def test_no_log_and_no_span_holds_anything_of_a_request(
    stack: Stack, traces: Collector, images: ImageServer
) -> None:
    body = png(new_image())
    encoded = data_url(body).partition(",")[2]
    hidden = images.put("/secret-path.png?token=abc123", body)
    unreachable = "https://user-secret.invalid/a.png?token=abc123"
    stack.ask(data_url(body), QUESTION, extra_body={"cache_salt": "salt-secret"})
    stack.ask(hidden, "question-secret")
    for bad in (unreachable, data_url(body[:100]), "file:///etc/path-secret"):
        with pytest.raises(openai.APIStatusError):
            stack.ask(bad, QUESTION)
    secrets_told = ("abc123", "secret", encoded[40:80], encoded[-80:-40])
    # A worker that no image went to yet has nothing to say at DEBUG, and would tell nothing here.
    wait_until(
        lambda: bool(stack.ask(new_image(), QUESTION)) and all(map(logs_at_debug, workers(stack))),
        30,
        "not every worker logged at DEBUG",
    )
    for process in workers(stack):
        text = process.log.read_text()
        for secret in secrets_told:
            assert secret not in text
    wait_until(lambda: bool(traces.bodies), 10, "no spans came")
    for sent in traces.spans():
        assert not any(secret in str(sent) for secret in secrets_told), sent.name


def test_everything_is_dropped_on_every_worker(stack: Stack) -> None:
    ask_both(stack, new_image(), QUESTION)
    assert all(count > 0 for count in entries(stack)[:2])
    done = command(stack, "drop", "--all")
    assert done.returncode == 0, done.stderr
    assert entries(stack) == [0, 0, 0, 0]
    assert done.stdout.count("PD worker ") == 2
    assert done.stdout.count("encode worker ") == 2
    assert command(stack, "drop", "--all").stdout.count("dropped 0 embeddings of 0 bytes") == 4


def test_one_salt_is_dropped_and_the_others_stay(stack: Stack) -> None:
    picture = new_image()
    for salt in ("tenant-one", "tenant-two"):
        ask_both(stack, picture, QUESTION, extra_body={"cache_salt": salt})
    before = entries(stack)
    done = command(stack, "drop", "--salt", stdin="tenant-one\n")
    assert done.returncode == 0, done.stderr
    after = entries(stack)
    assert [old - new for old, new in zip(before, after, strict=True)][:2] == [1, 1]
    assert sum(before[2:]) - sum(after[2:]) == 1
    assert "tenant-one" not in done.stdout + done.stderr


def test_one_key_is_dropped_as_the_requests_line_has_it(stack: Stack) -> None:
    command(stack, "drop", "--all")
    ask_both(stack, new_image(), QUESTION)
    assert command(stack, "drop", "--key", "0" * 64).returncode == 0
    assert sum(entries(stack)) == 3, "two PD workers and one encode worker have it"
    (key,) = max(request_lines(stack), key=lambda line: str(line["time"]))["keys"]
    done = command(stack, "drop", "--key", key)
    assert done.returncode == 0, done.stderr
    assert sum(entries(stack)) == 0


@pytest.mark.parametrize("where", ["file", "URL", "data"])
def test_an_image_is_dropped_for_every_tenant(
    stack: Stack, images: ImageServer, tmp_path: Path, where: str
) -> None:
    command(stack, "drop", "--all")
    image = new_image()
    (tmp_path / "image.png").write_bytes(png(image))
    named = {
        "file": str(tmp_path / "image.png"),
        "URL": images.put("/image.png?token=abc123", png(image)),
        "data": data_url(png(image)),
    }
    for salt in ("tenant-one", "tenant-two", None):
        ask_both(stack, image, QUESTION, extra_body={"cache_salt": salt} if salt else {})
    ask_both(stack, new_image(), QUESTION)
    assert sum(entries(stack)) == 4 * 3
    done = command(stack, "drop", "--image", named[where])
    assert done.returncode == 0, done.stderr
    assert sum(entries(stack)) == 3, "the other image stays on both PD workers and one encode worker"
    assert f"the image has {len(png(image))} bytes" in done.stdout
    assert "abc123" not in done.stdout + done.stderr


def test_an_image_that_cannot_be_read_drops_nothing(
    stack: Stack, images: ImageServer, tmp_path: Path
) -> None:
    ask_both(stack, new_image(), QUESTION)
    before = entries(stack)
    for absent in (str(tmp_path / "none.png"), f"{images.url}/none.png?token=abc123"):
        done = command(stack, "drop", "--image", absent)
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("error: ")
        assert "abc123" not in done.stderr
    assert entries(stack) == before


@pytest.mark.parametrize("arguments", [(), ("--all", "--key", "0" * 64), ("--key", "0")])
def test_what_to_drop_must_be_said(stack: Stack, arguments: tuple[str, ...]) -> None:
    done = command(stack, "drop", *arguments)
    assert done.returncode == 2
    assert "--key" in done.stderr


def test_without_workers_it_says_where_it_looked_and_the_way_out(tmp_path: Path) -> None:
    done = command_in(tmp_path, "drop", "--all")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: no worker of dyn://dynamo.pd.generate or dyn://dynamo.encode.encode"
    )
    assert f"was found in {tmp_path} (DYN_FILE_KV)" in done.stderr
    assert "launch/disagg_e_pd.sh prints the line to copy" in done.stderr


def test_discovery_that_cannot_begin_is_one_line(tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text("0123456789abcdef" * 2)
    secret.chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_mm_cache.cli", "drop", "--all"],
        env={
            **os.environ,
            "DYN_DISCOVERY_BACKEND": "kubernetes",
            "DYN_LOG": "off",
            "MM_CACHE_SECRET_FILE": str(secret),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: cannot join a deployment by kubernetes discovery: POD_NAME not available"
    )


def test_a_worker_that_serves_says_that_it_is_healthy(stack: Stack) -> None:
    for process in workers(stack):
        for path, status in (("health", "ready"), ("live", "live")):
            with urllib.request.urlopen(
                f"http://127.0.0.1:{process.system_port}/{path}", timeout=5
            ) as answer:
                assert json.load(answer)["status"] == status


def test_a_tool_in_a_workers_container_leaves_the_workers_port_alone(stack: Stack) -> None:
    done = command(stack, "drop", "--all", DYN_SYSTEM_PORT=str(workers(stack)[0].system_port))
    assert done.returncode == 0
    assert not done.stderr


def test_a_dropped_picture_is_served_afterwards(stack: Stack) -> None:
    picture = new_image()
    answer = stack.ask(picture, QUESTION)
    assert command(stack, "drop", "--all").returncode == 0
    assert stack.ask(picture, QUESTION) == answer
    assert message(picture, QUESTION)
