"""What a client with bad intentions is told by the real frontend, and that the stack serves on."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from PIL import Image

from tests.e2e.conftest import Oracle
from tests.e2e.stack import Stack, data_url, image_part, new_image, png, wait_until
from tests.media import images
from tests.media.images import saved
from tests.services import anonymous_bytes

QUESTION = "What is this?"


def post(stack: Stack, body: Any) -> tuple[int, str]:
    """Send a body as it is, past any client's own checks; return status and text."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - the stack's own address
        f"{stack.url}/chat/completions", data, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def chat(stack: Stack, *images: str, **changes: Any) -> dict[str, Any]:
    content = [*(image_part(url) for url in images), {"type": "text", "text": QUESTION}]
    return {
        "model": stack.model,
        "max_tokens": 1,
        "messages": [{"role": "user", "content": content}],
    } | changes


def picture_url() -> str:
    return data_url(png(new_image(56, 56)))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature of another type": ({"temperature": "hot"}, "temperature"),
    "temperature": ({"temperature": -1}, "temperature"),
    "temperature, huge": ({"temperature": 1e30}, "temperature"),
    "top_p": ({"top_p": 7}, "top_p"),
    "max_tokens": ({"max_tokens": -5}, "max_tokens"),
    "max_tokens of another type": ({"max_tokens": "many"}, "max_tokens"),
    "seed": ({"seed": "x"}, "seed"),
    "n": ({"n": 5}, "n"),
    "stop": ({"stop": {"a": 1}}, "stop"),
    "processor kwargs, a list": ({"mm_processor_kwargs": [1]}, "mm_processor_kwargs"),
    "processor kwargs, huge": ({"mm_processor_kwargs": {"a": "x" * 100_000}}, "mm_processor_kwargs"),
    "processor kwargs, nested": ({"mm_processor_kwargs": {"a": nested(50)}}, "mm_processor_kwargs"),
    "processor kwargs, a size of gigabytes": (
        {"mm_processor_kwargs": {"max_pixels": 10**15}},
        "longest_edge",
    ),
    "salt of another type": ({"cache_salt": 5}, "cache_salt"),
    "salt, huge": ({"cache_salt": "x" * 100_000}, "cache_salt"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_served_is_named(stack: Stack, name: str) -> None:
    changes, field = FIELDS[name]
    status, text = post(stack, chat(stack, picture_url(), **changes))
    assert 400 <= status < 500, text
    assert field in text.lower()
    assert len(text) < 2000


IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "image 1"),
    "bomb": (images.png_bomb(30_000, 30_000), "limit"),
    "strip": (saved(Image.new("L", (1, 60_000)), "PNG"), "crop it"),
    "scans": (images.jpeg_of_scans(200), "scans"),
    "html": (b"<!doctype html>", "accepted format"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_named_without_insides(stack: Stack, name: str) -> None:
    media, says = IMAGES[name]
    status, text = post(stack, chat(stack, data_url(media)))
    assert 400 <= status < 500, text
    assert says in text
    assert not any(
        inside in text for inside in ("PIL", "Traceback", "site-packages", " 0x", "/root", "/home")
    )


@pytest.mark.parametrize(
    "reference",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://user:secret@example.invalid/a.png",
        "ftp://example.invalid/a.png",
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "data:image/png;base64,@@@@",
    ],
)
def test_a_reference_that_leads_nowhere_good(stack: Stack, reference: str) -> None:
    status, text = post(stack, chat(stack, reference))
    assert 400 <= status < 500, text
    assert "secret" not in text
    assert "root:" not in text


def test_hundreds_of_images(stack: Stack) -> None:
    status, text = post(stack, chat(stack, *[picture_url()] * 300))
    assert status == 400
    assert "300 images are more than the 32" in text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b'{"model": 5}', b"\xff\xfe"])
def test_bodies_that_are_no_request(stack: Stack, body: bytes) -> None:
    status, _ = post(stack, body)
    assert 400 <= status < 500
    assert stack.ask(new_image(), QUESTION)


def test_an_oriented_photograph_is_answered_as_the_upright_one(stack: Stack, oracle: Oracle) -> None:
    picture = new_image(112, 56)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=images.exif(6))
    expected = oracle([picture.transpose(Image.Transpose.ROTATE_270)], ["", QUESTION])
    before = stack.encodes()
    answers = [stack.ask(data_url(buffer.getvalue()), QUESTION) for _ in range(2)]
    assert answers == [expected] * 2
    assert stack.encodes() == before + 1


def test_an_answer_tells_of_hits_in_its_own_salt_alone(stack: Stack) -> None:
    url = picture_url()
    shapes, cached = [], []
    for salt in ("a", "a", "b"):
        status, text = post(stack, chat(stack, url, cache_salt=salt))
        assert status == 200, text
        answer = json.loads(text)
        del answer["id"], answer["created"]
        cached.append(answer["usage"].pop("prompt_tokens_details")["cached_tokens"] > 0)
        shapes.append(json.dumps(answer, sort_keys=True))
    assert cached == [False, True, False]
    assert len(set(shapes)) == 1


BROKEN_FILE_BYTES = 11 * 1024**2
MOST_GROWTH_BYTES = 64 * 1024**2


def test_sixty_broken_images_leave_both_workers_as_large_as_before(stack: Stack) -> None:
    body = png(new_image(56, 56))
    broken = body[: len(body) // 2] + bytes(BROKEN_FILE_BYTES)

    def send(count: int) -> None:
        for number in range(count):
            status, text = post(stack, chat(stack, data_url(broken + number.to_bytes(4, "big"))))
            assert status == 400, text

    send(10)
    workers = [*stack.workers("PD"), *stack.workers("encode")]
    before = [anonymous_bytes(worker.pid) for worker in workers]
    send(60)
    wait_until(
        lambda: all(
            anonymous_bytes(worker.pid) - size < MOST_GROWTH_BYTES
            for worker, size in zip(workers, before, strict=True)
        ),
        10,
        f"a worker keeps what failed requests sent; before: {before}",
    )
