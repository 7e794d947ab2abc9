"""Encode workers that answer wrongly, in every way that there is a check for, behind a real PD worker.

With one such worker of two, its calls are repeated on the other and the client gets the true answer. With
two, the client gets an error, and nothing of it is cached: when they are well again, the same picture's
answer is true. The cards are asked about through frontend, PD worker and NIXL; the truth is known.
"""

from __future__ import annotations

import openai
import pytest

from tests.e2e.cards import Deal
from tests.faults.asking import LONG, ask_until_called
from tests.faults.deployment import Deployment
from tests.faults.encode_peer import FAULTS

ALWAYS = {"torn-bytes", "rows", "nan", "metadata", "other-image", "timed-out", "empty"}
WRONG = [
    pytest.param(fault, marks=() if fault in ALWAYS else LONG)
    for fault in (*FAULTS, "other-image", "timed-out", "empty")
]


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_is_repeated_elsewhere_and_never_cached(
    deployment: Deployment, deal: Deal, fault: str
) -> None:
    bad = deployment.peers[:1]
    retries = deployment.pd_metric("trtllm_mm_cache_encode_retries_total")
    deployment.fault(fault, peers=bad)
    ask_until_called(deployment, deal, deployment.peers[0])
    assert deployment.pd_metric("trtllm_mm_cache_encode_retries_total") > retries

    entries = deployment.pd_metric("dynamo_component_embedding_cache_entries")
    deployment.fault(fault)
    asked = deal()
    with pytest.raises(openai.APIStatusError) as refused:
        deployment.ask(asked)
    assert refused.value.status_code in (502, 503), refused.value
    assert deployment.pd_metric("dynamo_component_embedding_cache_entries") == entries

    deployment.fault("good")
    assert deployment.ask(asked) == asked.answer
    ask_until_called(deployment, deal, deployment.peers[0])  # so that its breaker counts from nothing again
    deployment.nothing_held()


def test_an_export_that_is_not_read_is_released_and_does_not_wait_for_its_timeout(
    deployment: Deployment, deal: Deal
) -> None:
    released, timed_out = deployment.exports("released"), deployment.exports("timed_out")
    deployment.fault("rows")
    with pytest.raises(openai.APIStatusError):
        deployment.ask(deal())
    deployment.fault("good")
    deployment.nothing_held()
    assert deployment.exports("released") == released + 2
    assert deployment.exports("timed_out") == timed_out
