"""The messages between PD and encode worker: exact over the wire, and nothing else is accepted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.errors import (
    EncodeFailedError,
    EncodeOverloadedError,
    InvalidImageError,
    ProtocolMismatchError,
)
from trtllm_mm_cache.runtime.messages import EncodeFault, EncodeReady, EncodeRequest, parse, parse_answer
from trtllm_mm_cache.runtime.rendezvous import rendezvous_rank

DIGEST = "ab" * 32


def request(**changes: Any) -> dict[str, Any]:
    return {
        "version": 2,
        "fingerprint": DIGEST,
        "key": DIGEST,
        "media": b"\x89PNG",
        "processor_kwargs": {"max_pixels": 1},
        "variant": "single",
    } | changes


def ready(**changes: Any) -> dict[str, Any]:
    return {
        "version": 2,
        "status": "ready",
        "fingerprint": DIGEST,
        "key": DIGEST,
        "peer": {"agent_name": "a"},
        "token": "t",
        "address": 4096,
        "nbytes": 64,
        "checksum": 2**64 - 1,
        "dtype": "float32",
        "shape": [4, 4],
        "grid_thw": [1, 2, 2],
        "placeholder": "<image>",
        "encode_seconds": 0.25,
        "origin": "encoded",
    } | changes


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def over_the_wire(message: EncodeRequest | EncodeReady | EncodeFault) -> Any:
    """What the request plane does to a message: tuples become lists, bytes stay."""
    payload = message.model_dump()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in payload.items()}


def test_messages_survive_the_wire() -> None:
    asked = parse(EncodeRequest, request())
    assert parse(EncodeRequest, over_the_wire(asked)) == asked
    answered = parse_answer(ready())
    assert parse_answer(over_the_wire(answered)) == answered
    assert answered.shape == (4, 4)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 1}, "version"),
        ({"fingerprint": "ab"}, "fingerprint"),
        ({"key": DIGEST.upper()}, "key"),
        ({"media": "text"}, "media"),
        ({"variant": "x" * 65}, "variant"),
        ({"path": "/etc/passwd"}, "path"),
        ({"media": None}, "media"),
        ({"media": {"path": "/etc/passwd"}}, "media"),
        ({"kind": "smell"}, "kind"),
        ({"retain": 1}, "retain"),
        ({"processor_kwargs": []}, "processor_kwargs"),
        ({"processor_kwargs": {1: 1}}, "processor_kwargs"),
        ({"processor_kwargs": {"a": b"bytes"}}, "processor_kwargs"),
        ({"processor_kwargs": {"a": float("nan")}}, "processor_kwargs"),
        ({"processor_kwargs": {"a": 2**64}}, "processor_kwargs"),
        ({"processor_kwargs": {str(n): n for n in range(300)}}, "processor_kwargs"),
        ({"processor_kwargs": {"a": "x" * 10_000}}, "processor_kwargs"),
        ({"processor_kwargs": nested(9)}, "processor_kwargs"),
        ({"processor_kwargs": nested(100_000)}, "processor_kwargs"),
    ],
)
def test_another_request_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ProtocolMismatchError, match=field):
        parse(EncodeRequest, request(**changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": "1"}, "version"),
        ({"address": 0}, "address"),
        ({"address": 2**64}, "address"),
        ({"nbytes": -1}, "nbytes"),
        ({"nbytes": 2**40}, "nbytes"),
        ({"nbytes": 64.0}, "nbytes"),
        ({"checksum": -1}, "checksum"),
        ({"shape": [4]}, "shape"),
        ({"shape": [4, 0]}, "shape"),
        ({"shape": [4, 4, 4]}, "shape"),
        ({"dtype": "f" * 33}, "dtype"),
        ({"origin": "stolen"}, "origin"),
        ({"encode_seconds": float("nan")}, "encode_seconds"),
        ({"fingerprint": "../../etc/passwd"}, "fingerprint"),
        ({"key": None}, "key"),
        ({"token": "x" * 129}, "token"),
        ({"placeholder": "x" * 5_000_000}, "placeholder"),
        ({"placeholder": nested(100_000)}, "placeholder"),
        ({"grid_thw": [1, 2]}, "grid_thw"),
        ({"grid_thw": [1, 2, 2**31]}, "grid_thw"),
        ({"grid_thw": [1, 2, 2.0]}, "grid_thw"),
        ({"extra": 1}, "extra"),
        ({"status": "maybe"}, "status"),
    ],
)
def test_another_answer_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ProtocolMismatchError, match=field):
        parse_answer(ready(**changes))


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.binary(), st.lists, max_leaves=5)
)
def test_any_other_payload_is_refused(payload: Any) -> None:
    for kind in (EncodeRequest, EncodeReady, EncodeFault):
        with pytest.raises(ProtocolMismatchError):
            parse(kind, payload)


def test_errors_cross_the_wire_as_themselves() -> None:
    for error in (EncodeOverloadedError("full"), InvalidImageError("truncated")):
        with pytest.raises(type(error), match=error.message):
            parse_answer(over_the_wire(EncodeFault.of(error)))


def test_an_error_of_a_newer_release_keeps_its_name() -> None:
    with pytest.raises(EncodeFailedError, match="shiny_new: why"):
        parse_answer({"version": 2, "status": "error", "code": "shiny_new", "message": "why"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"fingerprint": "cd" * 32}, "another model"), ({"key": "cd" * 32}, "another item")],
)
def test_an_answer_to_another_question_is_refused(changes: dict[str, Any], says: str) -> None:
    asked = parse(EncodeRequest, request())
    parse_answer(ready()).check_answers(asked)
    with pytest.raises(ProtocolMismatchError, match=says):
        parse_answer(ready(**changes)).check_answers(asked)


instances = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8, unique=True)
keys = st.binary(min_size=32, max_size=32).map(EmbeddingKey)


@given(keys, instances)
def test_every_pd_worker_ranks_alike_whatever_order_it_sees(key: EmbeddingKey, ids: list[int]) -> None:
    ranked = rendezvous_rank(key.digest, ids)
    assert ranked == rendezvous_rank(key.digest, ids[::-1])
    assert sorted(ranked) == sorted(ids)


@given(keys, instances)
def test_an_instance_that_goes_moves_only_its_own_keys(key: EmbeddingKey, ids: list[int]) -> None:
    ranked = rendezvous_rank(key.digest, ids)
    for gone in ids:
        rest = [instance for instance in ids if instance != gone]
        assert rendezvous_rank(key.digest, rest) == [instance for instance in ranked if instance != gone]


def test_keys_spread_evenly() -> None:
    ids = [11, 22, 33, 44]
    homes = [rendezvous_rank(n.to_bytes(32, "big"), ids)[0] for n in range(4000)]
    deviation = math.sqrt(4000 * 0.25 * 0.75)
    assert all(abs(homes.count(instance) - 1000) < 5 * deviation for instance in ids)
