"""The entry's format: what is sealed opens as it was, and nothing else opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.tiers.format import HEADER_BYTES, REFUSALS, Header, RefusedEntryError, Sealer

VECTORS = json.loads((Path(__file__).parent / "format_vectors.json").read_text())

digests = st.binary(min_size=32, max_size=32)
headers = st.builds(
    Header,
    kind=st.sampled_from(["image", "video"]),
    key=digests.map(bytes.hex),
    fingerprint=digests.map(bytes.hex),
    tag=st.none() | st.binary(min_size=16, max_size=16),
    content=st.none() | digests,
    nbytes=st.integers(1, 2**32),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    shape=st.tuples(st.integers(1, 2**31), st.integers(1, 2**31)),
    metadata=st.builds(
        EmbeddingMetadata,
        grid_thw=st.none() | st.tuples(*[st.integers(1, 1000)] * 3),
        placeholder=st.none() | st.text(max_size=200),
        encode_seconds=st.floats(0, 1e6),
        checksum=st.none() | st.integers(0, 2**64 - 1),
    ),
    made_at=st.floats(0, 1e11),
    payload_seal=digests,
)


def reason(sealer: Sealer, data: bytes, key: str) -> str:
    with pytest.raises(RefusedEntryError) as refused:
        sealer.open(data, key)
    assert refused.value.reason in REFUSALS
    return refused.value.reason


def sealed(sealer: Sealer, header: Header) -> bytes:
    data = sealer.seal(header)
    assert data is not None
    assert len(data) == HEADER_BYTES
    return data


@settings(deadline=None)
@given(header=headers, secret=st.binary(min_size=32, max_size=64))
def test_what_was_sealed_opens_as_it_was(header: Header, secret: bytes) -> None:
    assert Sealer(secret).open(sealed(Sealer(secret), header), header.key) == header


@settings(max_examples=300, deadline=None)
@given(header=headers, bit=st.integers(0, HEADER_BYTES * 8 - 1))
def test_one_flipped_bit_anywhere_and_it_does_not_open(header: Header, bit: int) -> None:
    sealer = Sealer(b"s" * 32)
    data = bytearray(sealed(sealer, header))
    data[bit // 8] ^= 1 << bit % 8
    reason(sealer, bytes(data), header.key)


@settings(deadline=None)
@given(data=st.binary(max_size=3 * HEADER_BYTES), key=digests.map(bytes.hex))
def test_whatever_lies_there_is_refused_by_name(data: bytes, key: str) -> None:
    expected = "truncated" if len(data) < HEADER_BYTES else "garbage"
    assert reason(Sealer(b"s" * 32), data, key) == expected


@settings(deadline=None)
@given(header=headers, cut=st.integers(0, HEADER_BYTES - 1))
def test_a_part_of_a_header_is_refused(header: Header, cut: int) -> None:
    sealer = Sealer(b"s" * 32)
    assert reason(sealer, sealed(sealer, header)[:cut], header.key) == "truncated"


@settings(deadline=None)
@given(header=headers)
def test_another_secret_version_or_key_each_has_its_name(header: Header) -> None:
    sealer = Sealer(b"s" * 32)
    data = sealed(sealer, header)
    assert reason(Sealer(b"t" * 32), data, header.key) == "foreign_secret"
    assert reason(sealer, data[:7] + b"\x02" + data[8:], header.key) == "foreign_version"
    assert reason(sealer, data, "another") == "other_key"
    forged = Sealer(b"t" * 32).seal(header)
    assert forged is not None
    assert reason(sealer, forged[:8] + data[8:16] + forged[16:], header.key) == "damaged"


def test_megabytes_of_placeholder_fit_and_noise_does_not() -> None:
    vector = VECTORS[0]
    header = Sealer(bytes.fromhex(vector["secret"])).open(bytes.fromhex(vector["header"]), vector["key"])
    sealer = Sealer(b"s" * 32)

    def with_placeholder(text: str) -> Header:
        return Header(
            **{name: getattr(header, name) for name in Header.__slots__ if name != "metadata"},
            metadata=EmbeddingMetadata(placeholder=text),
        )

    long = with_placeholder("<|image_pad|>" * 100_000)
    assert sealer.open(sealed(sealer, long), header.key) == long
    noise = "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(5000))
    assert sealer.seal(with_placeholder(noise)) is None


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_published_vectors(vector: dict[str, str]) -> None:
    """Sealed once and written down: an entry of today opens tomorrow, in any language."""
    sealer = Sealer(bytes.fromhex(vector["secret"]))
    data, payload = bytes.fromhex(vector["header"]), bytes.fromhex(vector["payload"])
    if "refused" in vector:
        assert reason(sealer, data, vector["key"]) == vector["refused"]
        return
    header = sealer.open(data, vector["key"])
    assert header.payload_seal == sealer.payload_seal(payload)
    assert json.loads(vector["fields"]) == {
        "kind": header.kind,
        "fingerprint": header.fingerprint,
        "tag": header.tag and header.tag.hex(),
        "content": header.content and header.content.hex(),
        "nbytes": header.nbytes,
        "dtype": header.dtype,
        "shape": list(header.shape),
        "grid_thw": list(header.metadata.grid_thw or ()),
        "placeholder": header.metadata.placeholder,
        "made_at": header.made_at,
    }
