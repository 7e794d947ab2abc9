"""Calls and answers by the deployment's secret, and everything that is not quite one."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from dynamo.runtime import Context

from trtllm_mm_cache.errors import NotAMemberError
from trtllm_mm_cache.runtime.membership import PROOF_FIELD, Call, Membership
from trtllm_mm_cache.runtime.streaming import RequestContext

SECRET = b"0123456789abcdef" * 2
ME, OTHER = 7, 8
MEMBERS = Membership(SECRET)

Payload = dict[str, Any]


class Worker:
    """A handler behind the guard, which tells what reached it."""

    def __init__(self) -> None:
        self.reached: list[Any] = []
        self.handle = MEMBERS.guarded("encode", ME, self._handle)

    async def _handle(self, payload: Any, context: RequestContext) -> AsyncIterator[Payload]:
        self.reached.append(payload)
        for number in (0.1, 2):
            yield {"answer": number, "shape": (1, 2)}

    async def ask(self, payload: Any) -> list[Payload]:
        return [answer async for answer in self.handle(payload, Context())]


async def test_a_member_is_answered_and_its_answers_are_proved() -> None:
    worker, call = Worker(), MEMBERS.call("encode", ME)
    answers = await worker.ask(call.seal({"key": "k", "wide": "\ud800é"}, media=b"\0\xff"))
    assert worker.reached == [{"key": "k", "wide": "\ud800é", "media": b"\0\xff"}]
    assert [call.open(answer) for answer in answers] == [
        {"answer": 0.1, "shape": [1, 2]},
        {"answer": 2, "shape": [1, 2]},
    ]


async def test_what_comes_apart_replaces_nothing_that_was_proved() -> None:
    worker, call = Worker(), MEMBERS.call("encode", ME)
    sealed = call.seal({"key": "k"}, media=b"")
    await worker.ask(sealed | {"apart": {"key": "another", "media": b"1"}})
    assert worker.reached == [{"key": "k", "media": b"1"}]


def sealed(call: Call, **changes: Any) -> Payload:
    return {**call.seal({"key": "k"}), **changes}


STRANGERS: dict[str, Callable[[], Any]] = {
    "no proof": lambda: {"key": "k"},
    "no dictionary": lambda: ["key"],
    "empty": lambda: None,
    "another secret": lambda: sealed(Membership(SECRET[::-1]).call("encode", ME)),
    "for another worker": lambda: sealed(MEMBERS.call("encode", OTHER)),
    "for another purpose": lambda: sealed(MEMBERS.call("control", ME)),
    "another message": lambda: sealed(MEMBERS.call("encode", ME), body=json.dumps({"key": "l"})),
    "another nonce": lambda: sealed(MEMBERS.call("encode", ME), nonce="0" * 32),
    "no text as proof": lambda: sealed(MEMBERS.call("encode", ME), proof=b"0" * 64),
    "a proof that is not ASCII": lambda: sealed(MEMBERS.call("encode", ME), proof="é" * 64),
    "no text as body": lambda: sealed(MEMBERS.call("encode", ME), body=7),
    "an answer's proof": lambda: sealed(
        MEMBERS.call("encode", ME), nonce="n", proof=MEMBERS.mac("answer", "encode", ME, "n", '{"key":"k"}')
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_who_has_no_proof_reaches_no_handler_and_learns_nothing(stranger: str) -> None:
    worker = Worker()
    (answer,) = await worker.ask(STRANGERS[stranger]())
    assert worker.reached == []
    assert answer["code"] == "not_a_member"
    assert set(answer) == {"version", "status", "code", "message"}


def shifted(call: Call) -> Payload:
    """The parts of a proof are told apart by their lengths, not by what stands between."""
    return {"body": "", "proof": MEMBERS.mac("answer", "encode", ME, call.nonce + "x", "")}


LIES: dict[str, Callable[[Call], Any]] = {
    "no proof": lambda call: {"body": "{}"},
    "no body": lambda call: {"answer": 1},
    "nothing": lambda call: None,
    "another secret": lambda call: {
        "body": "{}",
        "proof": Membership(SECRET[::-1]).mac("answer", "encode", ME, call.nonce, "{}"),
    },
    "another call's answer": lambda call: {
        "body": "{}",
        "proof": MEMBERS.mac("answer", "encode", ME, "other", "{}"),
    },
    "another worker's answer": lambda call: {
        "body": "{}",
        "proof": MEMBERS.mac("answer", "encode", OTHER, call.nonce, "{}"),
    },
    "the call itself": lambda call: call.seal({}),
    "another body": lambda call: {
        "body": "[]",
        "proof": MEMBERS.mac("answer", "encode", ME, call.nonce, "{}"),
    },
    "shifted": shifted,
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_without_proof_is_not_believed(lie: str) -> None:
    call = MEMBERS.call("encode", ME)
    with pytest.raises(NotAMemberError, match="did not prove"):
        call.open(LIES[lie](call))


def test_the_proof_of_a_generate_request_is_taken_off_and_answered() -> None:
    call = MEMBERS.call("generate", ME)
    payload = {"token_ids": [1], PROOF_FIELD: call.proof()}
    output = MEMBERS.admit(ME, payload, required=True)
    assert payload == {"token_ids": [1]}
    call.check(output[PROOF_FIELD])
    with pytest.raises(NotAMemberError):
        MEMBERS.call("generate", ME).check(output[PROOF_FIELD])


@pytest.mark.parametrize("required", [True, False])
def test_a_false_proof_of_a_generate_request_is_refused_also_where_none_is_required(required: bool) -> None:
    payload = {PROOF_FIELD: MEMBERS.call("generate", OTHER).proof()}
    with pytest.raises(NotAMemberError):
        MEMBERS.admit(ME, payload, required=required)


def test_a_generate_request_without_a_proof_needs_permission() -> None:
    assert MEMBERS.admit(ME, {"token_ids": [1]}, required=False) == {}
    with pytest.raises(NotAMemberError):
        MEMBERS.admit(ME, {"token_ids": [1]}, required=True)


def test_the_secret_is_in_no_text(caplog: pytest.LogCaptureFixture) -> None:
    members = Membership(SECRET)
    call = members.call("encode", ME)
    with caplog.at_level(logging.WARNING), pytest.raises(NotAMemberError) as caught:
        members.check("encode", ME, {})
    texts = [repr(members), repr(call), str(call.seal({"a": 1})), str(caught.value), caplog.text]
    assert "without the deployment's secret" in caplog.text
    assert not [text for text in texts if SECRET.decode() in text or SECRET.hex() in text]


def test_a_stranger_that_calls_often_writes_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    members = Membership(SECRET)
    for _ in range(1000):
        with pytest.raises(NotAMemberError):
            members.check("encode", ME, {})
    assert members.refused == 1000
    assert len(caplog.records) == 10
