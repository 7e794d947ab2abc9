"""What a client can make a deployment write: never a line of its own, never a URL's query."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.image_server import ImageServer, image_server
from tests.e2e.stack import Process, Stack, data_url, launched, message, new_image, png, wait_until

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) +[\w.]+: ")
FORGED = "a\n2026-01-01 00:00:00,000 INFO    trtllm_mm_cache.runtime: dropped 0 entries\r\x1b[2J\u2028\u202e"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with launched(
        tmp_path_factory.mktemp("logs") / "run",
        *("--multimodal-embedding-cache-capacity-gb", "0.03125", "--allow-private-addresses"),
        DYN_LOG="warn",
    ) as running:
        yield running


@pytest.fixture
def images() -> Iterator[ImageServer]:
    with image_server() as server:
        yield server


def post(stack: Stack, *parts: Any, **fields: Any) -> int:
    """Send one request as it is, past any client's own checks; return the status."""
    body = {"model": stack.model, "max_tokens": 1, "messages": [message(*parts)]} | fields
    request = urllib.request.Request(  # noqa: S310 - the stack's own address
        f"{stack.url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def lines(process: Process) -> list[str]:
    """What it has written, by the one separator that a log file has."""
    return process.log.read_bytes().decode().removesuffix("\n").split("\n")


def requests(stack: Stack) -> list[str]:
    """The lines of requests in the PD worker's log."""
    (worker,) = stack.workers("PD")
    return [line for line in lines(worker) if " trtllm_mm_cache.pd.record: request " in line]


def after(stack: Stack, *parts: Any, **fields: Any) -> tuple[int, list[str]]:
    """Send a request; return its status and all that the PD worker wrote about it, its own line last."""
    (worker,) = stack.workers("PD")
    before, known = len(lines(worker)), len(requests(stack))
    status = post(stack, *parts, **fields)
    wait_until(lambda: len(requests(stack)) == known + 1, 10, "the request was not logged")
    # The next request's line comes behind all that the PD worker had to say of this one.
    assert post(stack, "Hello?") == 200
    wait_until(lambda: len(requests(stack)) == known + 2, 10, "the request was not logged")
    return status, lines(worker)[before:-1]


MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "forged settings": ((new_image(56, 56), "?"), {"mm_processor_kwargs": {FORGED: 1}}),
    "a private file": (("file:///etc/passwd", "?"), {}),
    "no image": ((data_url(b"no image"), "?"), {}),
    "a broken image": ((data_url(png(new_image(56, 56))[:100]), "?"), {}),
    "no base64": (("data:image/png;base64,@@@@", "?"), {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_clients_mistake_writes_one_line_and_no_traceback(deployment: Stack, mistake: str) -> None:
    parts, fields = MISTAKES[mistake]
    status, written = after(deployment, *parts, **fields)
    assert 400 <= status < 500
    assert len(written) == 1, "\n".join(written)
    assert " WARNING " in written[0]
    assert "outcome=failed" in written[0]


def test_a_forged_line_stays_inside_the_line_of_its_request(deployment: Stack) -> None:
    _, written = after(deployment, new_image(56, 56), "?", mm_processor_kwargs={FORGED: 1})
    (line,) = written
    assert r"a\n2026-01-01 00:00:00,000 INFO    trtllm_mm_cache.runtime: dropped 0 entries\r" in line
    assert r"\x1b[2J\u2028\u202e" in line


def test_no_process_writes_anything_but_lines_of_the_log(deployment: Stack) -> None:
    for parts, fields in MISTAKES.values():
        post(deployment, *parts, **fields)
    for process in deployment.processes:
        for line in lines(process):
            assert line.isprintable(), (process.name, line)
            assert LINE.match(line), (process.name, line)
            assert not line.startswith("2026-01-01"), (process.name, line)


def test_no_process_writes_the_private_part_of_a_url(deployment: Stack, images: ImageServer) -> None:
    body = png(new_image(56, 56))
    there = images.put("/image.png?token=told-nobody", body)
    user = there.replace("http://", "http://name:told-nobody@").replace("?token=told-nobody", "")
    for url in (
        there,
        f"{images.url}/absent.png?token=told-nobody",
        "http://127.0.0.1:1/image.png?token=told-nobody#told-nobody",
        "https://told-nobody.invalid/image.png?token=told-nobody",
        user,
        data_url(body[:100]),
        "file:///image.png?token=told-nobody",
    ):
        post(deployment, url, "?")
    encoded = data_url(body).partition(",")[2]
    for process in deployment.processes:
        text = process.log.read_text()
        for private in ("token=told", ":told-nobody@", "#told-nobody", encoded[:40]):
            assert private not in text, process.name


def test_dynamos_lines_of_each_call_obey_its_level(deployment: Stack) -> None:
    assert post(deployment, new_image(56, 56), "?") == 200
    assert post(deployment, new_image(56, 56), "?") == 200
    for process in deployment.processes:
        assert " INFO router." not in process.log.read_text()
        assert not [line for line in lines(process) if " INFO " in line and "request_span" in line]


def test_the_keys_in_a_requests_line_are_those_that_drop_takes(deployment: Stack) -> None:
    first, second = new_image(56, 56), new_image(56, 56)
    _, (line,) = after(deployment, first, second, first, "?")
    keys = line.partition(" keys=")[2].partition(" ")[0].split(",")
    assert [len(key) for key in keys] == [64] * 3
    assert keys[0] == keys[2] != keys[1]
