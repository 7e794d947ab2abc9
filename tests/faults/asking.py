"""Asking about cards whose true answer is known, while workers come and go."""

from __future__ import annotations

import time

import openai
import pytest

from tests.e2e.cards import Asked, Deal
from tests.faults.deployment import Deployment
from tests.services import Service

LONG = pytest.mark.long


def answers(deployment: Deployment, asked: Asked) -> bool:
    """Ask; False for an answer 5xx. Any other answer than the true one fails the test."""
    try:
        answer = deployment.ask(asked)
    except openai.InternalServerError:
        return False
    assert answer == asked.answer
    return True


def ask_until_called(deployment: Deployment, deal: Deal, peer: Service) -> None:
    """Ask about new cards, all of which must be answered truly, until `peer` has been called."""
    before = deployment.calls(peer)
    for _ in range(40):
        asked = deal()
        assert deployment.ask(asked) == asked.answer
        if deployment.calls(peer) > before:
            return
    pytest.fail(f"forty keys and none of them chose {peer.name}")


def report(what: str, began: float) -> None:
    """Print how long a recovery took: seen with `pytest -s`, asserted nowhere."""
    print(f"{what}: {time.monotonic() - began:.2f} s")
