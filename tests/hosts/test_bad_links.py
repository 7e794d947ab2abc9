"""The cable is cut before and in the middle of a READ; the encode worker is frozen in the middle of one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import openai
import pytest
from PIL import Image

from tests.e2e.conftest import generate_answer
from tests.e2e.stack import new_image, wait_until
from tests.engines.contract import chat_case
from tests.hosts.deployment import LARGEST_SIDE, Deployment
from tests.services import Service

QUESTION = "Describe the picture."
QUARANTINED = "trtllm_mm_cache_quarantined_bytes"
LEASED = "trtllm_mm_cache_leased_bytes"
LARGE_BYTES = (LARGEST_SIDE // 28) ** 2 * 128 * 4
SLOW_KBIT = 1000


def answer(deployment: Deployment, picture: Image.Image) -> str:
    return generate_answer(chat_case(deployment.model, [picture], ["", QUESTION]), 24)


@contextmanager
def read_under_way(deployment: Deployment) -> Iterator[Future[str]]:
    """Have a READ on its slow way over the cable, and the request that waits for it."""
    encodes = deployment.far_metric("trtllm_mm_cache_encodes_total")
    with deployment.cable.slow(SLOW_KBIT):
        asked = deployment.begin(new_image(LARGEST_SIDE, LARGEST_SIDE), QUESTION)
        wait_until(
            lambda: deployment.far_metric("trtllm_mm_cache_encodes_total") > encodes,
            20,
            "nothing was encoded",
        )
        before = deployment.near.received_bytes()
        wait_until(
            lambda: deployment.near.received_bytes() > before + 40_000, 20, "no READ went over the cable"
        )
        yield asked


def refused(asked: Future[str]) -> float:
    """Return the seconds until a request was answered 503."""
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError) as error:
        asked.result(60)
    assert error.value.status_code == 503
    return time.monotonic() - began


def told(what: str, seconds: float) -> None:
    """Report a time; tests hold no clock to one."""
    print(f"{what} after {seconds:.2f} s")


def others_go_on(deployment: Deployment, cached: Image.Image, expected: str) -> None:
    assert deployment.ask(cached, QUESTION) == expected
    assert deployment.ask("Hello there!")


def served_again(deployment: Deployment, since: float) -> float:
    """Ask about new pictures until one is encoded on the far host; return the seconds since `since`."""

    def serves() -> bool:
        picture = new_image()
        try:
            return deployment.ask(picture, QUESTION) == answer(deployment, picture)
        except openai.InternalServerError:
            return False

    wait_until(serves, 30, "the far encode worker is not used again")
    return time.monotonic() - since


def nothing_is_left(deployment: Deployment) -> None:
    wait_until(
        lambda: deployment.metric(QUARANTINED) + deployment.metric(LEASED) == 0, 30, "an extent is still held"
    )
    wait_until(
        lambda: deployment.far_metric("trtllm_mm_cache_exports_held") == 0, 30, "an export is still held"
    )


def test_a_cut_before_the_read(deployment: Deployment) -> None:
    cached = new_image()
    expected = answer(deployment, cached)
    assert deployment.ask(cached, QUESTION) == expected
    deployment.cable.cut()
    try:
        asked = deployment.begin(new_image(), QUESTION)
        others_go_on(deployment, cached, expected)
        told("refused", refused(asked))
    finally:
        deployment.cable.mend()
    told("used again", served_again(deployment, time.monotonic()))
    nothing_is_left(deployment)


def test_a_cut_in_the_middle_of_a_read(deployment: Deployment) -> None:
    cached = new_image()
    expected = answer(deployment, cached)
    assert deployment.ask(cached, QUESTION) == expected
    with read_under_way(deployment) as asked:
        deployment.cable.cut()
    try:
        wait_until(lambda: deployment.metric(QUARANTINED) == LARGE_BYTES, 10, "no quarantine")
        others_go_on(deployment, cached, expected)
        told("refused", refused(asked))
        assert deployment.metric(QUARANTINED) == LARGE_BYTES, "time alone frees nothing"
    finally:
        deployment.cable.mend()
    told("used again", served_again(deployment, time.monotonic()))
    nothing_is_left(deployment)


def test_an_encode_worker_frozen_in_the_middle_of_a_read(deployment: Deployment) -> None:
    cached = new_image()
    expected = answer(deployment, cached)
    assert deployment.ask(cached, QUESTION) == expected
    with read_under_way(deployment) as asked:
        deployment.far_encoder.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: deployment.metric(QUARANTINED) == LARGE_BYTES, 10, "no quarantine")
        others_go_on(deployment, cached, expected)
        told("refused", refused(asked))
        assert deployment.metric(QUARANTINED) == LARGE_BYTES, "time alone frees nothing"
    finally:
        deployment.far_encoder.signal(signal.SIGCONT)
    told("used again", served_again(deployment, time.monotonic()))
    nothing_is_left(deployment)


def test_a_miss_behind_a_cut_cable_is_retried_on_another_host(deployment: Deployment) -> None:
    second = deployment.encode_worker(deployment.near, "near-encoder")
    second.start()
    try:
        second.wait_ready()
        wait_until(lambda: served_by(deployment, second), 30, "the second encode worker gets no request")
        retries = deployment.metric("trtllm_mm_cache_encode_retries_total")
        deployment.cable.cut()
        try:
            wait_until(
                lambda: (
                    answered(deployment)
                    and deployment.metric("trtllm_mm_cache_encode_retries_total") > retries
                ),
                60,
                "no picture's home was behind the cable",
            )
        finally:
            deployment.cable.mend()
    finally:
        second.stop()
    told("used again", served_again(deployment, time.monotonic()))
    nothing_is_left(deployment)


def answered(deployment: Deployment) -> bool:
    picture = new_image()
    assert deployment.ask(picture, QUESTION) == answer(deployment, picture)
    return True


def served_by(deployment: Deployment, encoder: Service) -> bool:
    return answered(deployment) and bool(
        deployment.near.do(lambda: encoder.process.metric("trtllm_mm_cache_encodes_total"))
    )
