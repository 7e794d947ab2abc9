"""More at once than the settings allow: a clear refusal, and hits go on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random

import openai
import pytest
from PIL import Image

from tests.e2e.cards import Asked, Deal
from tests.e2e.stack import wait_until
from tests.faults.deployment import MAX_REQUESTS, Deployment

QUESTION = "Where is the yellow cross?"


def photograph(rng: Random) -> Image.Image:
    """Return a picture of 600 KB: one is within the bound on waiting images, two are not."""
    return Image.frombytes("RGB", (448, 448), rng.randbytes(3 * 448 * 448))


def test_too_much_at_once_is_refused_while_hits_are_served(deployment: Deployment, deal: Deal) -> None:
    cached, rng = deal(), Random(1)
    assert deployment.ask(cached) == cached.answer
    one, two = (Asked((photograph(rng),), QUESTION, "") for _ in range(2))
    refused = "trtllm_mm_cache_refused_total"
    deployment.fault("held")
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        first = pool.submit(deployment.ask, one)
        wait_until(
            lambda: deployment.pd_metric("trtllm_mm_cache_waiting_image_bytes") > 0, 10, "nothing waits"
        )
        with pytest.raises(openai.InternalServerError) as image_refused:
            deployment.ask(two)
        assert image_refused.value.status_code == 503
        assert deployment.pd_metric(refused, what="image") == 1
        assert deployment.ask(cached) == cached.answer

        cards = [deal() for _ in range(MAX_REQUESTS - 1)]
        others = [pool.submit(deployment.ask, asked) for asked in cards]
        running = "trtllm_mm_cache_requests_in_flight"
        wait_until(lambda: deployment.pd_metric(running) == MAX_REQUESTS, 20, "the worker is not full")
        with pytest.raises(openai.InternalServerError) as request_refused:
            deployment.say("Hello")
        assert request_refused.value.status_code == 503
        assert deployment.pd_metric(refused, what="request") >= 1
        deployment.fault("good")
        first.result(30)
        assert [other.result(30) for other in others] == [asked.answer for asked in cards]
    deployment.nothing_held()
