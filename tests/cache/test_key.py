"""Keys: the published vectors, the framing, and what is refused."""

from __future__ import annotations

import base64
import itertools
import json
import math
from pathlib import Path
from typing import Any, cast

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_mm_cache.cache.key import (
    KEY_SCHEME,
    EmbeddingKey,
    Kind,
    canonical_json,
    content_digest,
    embedding_key,
)
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import InvalidRequestError

X = content_digest(b"x")
VECTORS = json.loads(Path(__file__).with_name("key_vectors.json").read_text("utf-8"))

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab1é"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1"), inner, max_size=3),
    max_leaves=5,
)
INPUTS = st.fixed_dictionaries(
    {
        "media": st.binary(max_size=8),
        "fingerprint": st.text("ab\x00", max_size=3),
        "processor_kwargs": st.none() | st.dictionaries(st.text("ab1"), JSON, max_size=2),
        "salt": st.none() | st.text("ab\x00", max_size=3),
        "variant": st.text("ab\x00", max_size=3),
    }
)


def _media(vector: dict[str, Any]) -> bytes:
    if "media_repeat" in vector:
        return bytes.fromhex(vector["media_repeat"]["hex"]) * int(vector["media_repeat"]["times"])
    return base64.b64decode(vector["media_base64"])


def _key(*, media: bytes, salt: str | None, **inputs: Any) -> EmbeddingKey:
    return embedding_key(content_digest(media), **inputs, scope=Scope(salt))


def _by_the_docstring(media: bytes, vector: dict[str, Any]) -> bytes:
    """The framing, written down a second time."""

    def field(tag: bytes, value: bytes) -> bytes:
        return tag + len(value).to_bytes(8, "big") + value

    kwargs = json.dumps(
        vector["processor_kwargs"] or {}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    fields = [
        field(b"K", VECTORS["scheme"].encode()),
        field(b"T", vector["kind"].encode()),
        field(b"F", vector["fingerprint"].encode()),
        field(b"V", vector["variant"].encode()),
        field(b"P", kwargs.encode()),
        field(b"S", vector["salt"].encode()) if vector["salt"] is not None else b"",
        field(b"C", blake3.blake3(media).digest()),
    ]
    return blake3.blake3(b"".join(fields)).digest()


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_published_vectors(vector: dict[str, Any]) -> None:
    media = _media(vector)
    inputs = {name: vector[name] for name in ("fingerprint", "kind", "processor_kwargs", "salt", "variant")}
    key = _key(media=media, **inputs)
    assert key.hex == vector["key"]
    assert list(key.int32s) == vector["int32s"]
    assert key.digest == _by_the_docstring(media, vector)


def test_the_vectors_are_for_this_scheme_and_all_differ() -> None:
    assert VECTORS["scheme"] == KEY_SCHEME
    keys = [vector["key"] for vector in VECTORS["vectors"]]
    assert len(set(keys)) == len(keys) >= 10


def test_the_kind_is_part_of_the_key_and_of_a_scope_the_salt_alone() -> None:
    image = embedding_key(X, fingerprint="f", kind="image")
    assert image != embedding_key(X, fingerprint="f", kind=cast("Kind", "video"))
    assert image == embedding_key(X, fingerprint="f", scope=Scope(None, tag=b"tag", retain=False))


def test_int32s_are_what_tensorrt_llm_makes_of_the_hex() -> None:
    digest = bytes.fromhex("000000017fffffff80000000ffffffff12345678deadbeef00ff00fffffffffe")
    key = EmbeddingKey(digest)
    assert key.int32s == (1, 2**31 - 1, -(2**31), -1, 0x12345678, 0xDEADBEEF - 2**32, 0x00FF00FF, -2)
    assert str(key) == key.hex == digest.hex()
    assert EmbeddingKey.from_hex(key.hex) == key


@given(INPUTS, INPUTS)
def test_different_inputs_have_different_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    def identity(inputs: dict[str, Any]) -> Any:
        # repr tells 1 from 1.0 and from True; kwargs None and {} are the same on purpose
        return {**inputs, "processor_kwargs": _sorted_repr(inputs["processor_kwargs"] or {})}

    assert (_key(**one) == _key(**other)) == (identity(one) == identity(other))


def _sorted_repr(value: Any) -> str:
    if isinstance(value, dict):
        return repr(sorted((key, _sorted_repr(inner)) for key, inner in value.items()))
    if isinstance(value, list):
        return repr([_sorted_repr(inner) for inner in value])
    return repr(value)


def test_bytes_cannot_move_from_one_field_to_the_next() -> None:
    splits = [("ab", "", ""), ("a", "b", ""), ("", "ab", ""), ("a", "", "b"), ("", "a", "b"), ("", "", "ab")]
    keys = {embedding_key(content_digest(m.encode()), fingerprint=f, variant=v) for f, v, m in splits}
    assert len(keys) == len(splits)


def test_order_of_kwargs_does_not_matter_and_no_salt_is_not_the_empty_salt() -> None:
    orders = itertools.permutations([("min_pixels", 4), ("max_pixels", 8), ("do_pan_and_scan", True)])
    keys = {embedding_key(X, fingerprint="f", processor_kwargs=dict(order)) for order in orders}
    assert len(keys) == 1
    assert embedding_key(X, fingerprint="f") != embedding_key(X, fingerprint="f", scope=Scope(""))


@pytest.mark.parametrize("container", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("nbytes", [0, 1024 * 1024 - 1, 1024 * 1024, 3 * 1024 * 1024])
def test_container_and_threading_do_not_matter(container: Any, nbytes: int) -> None:
    media = bytes(range(251)) * (nbytes // 251 + 1)
    expected = embedding_key(content_digest(media[:nbytes]), fingerprint="f")
    assert embedding_key(content_digest(container(media[:nbytes])), fingerprint="f") == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {"x": math.nan},
        {"x": [1, {"y": math.inf}]},
        {1: "x"},
        {"x": {True: 1}},
        {"x": [{None: 1}]},
        {"x": b"bytes"},
        {"x": {1, 2}},
        {"x": "\ud800"},
    ],
)
def test_kwargs_that_json_cannot_tell_apart_are_refused(kwargs: Any) -> None:
    with pytest.raises(InvalidRequestError, match="mm_processor_kwargs"):
        canonical_json(kwargs)


def test_kwargs_nested_too_deeply_are_refused() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequestError, match="mm_processor_kwargs"):
        canonical_json({"x": nested})


@pytest.mark.parametrize("name", ["salt", "variant", "fingerprint"])
def test_texts_that_utf8_cannot_write_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        _key(media=b"x", **{"fingerprint": "f", "salt": None, name: "\udc80"})


def test_media_itself_are_no_digest() -> None:
    with pytest.raises(InvalidRequestError, match="32 bytes, not 3"):
        embedding_key(b"png", fingerprint="f")


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31, "ab" * 33])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="key"):
        EmbeddingKey.from_hex(text)
