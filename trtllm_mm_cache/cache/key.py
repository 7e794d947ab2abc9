"""The key of an embedding: BLAKE3-256 over everything that decides its bytes.

The media's bytes go in by a digest of their own, which names all that was ever made of them, whatever the
key: by it one image's embeddings can be dropped for every tenant, model and setting.

The hashed text is a sequence of fields. Each field is a one-byte tag, the length of its value as an
unsigned 64-bit big-endian integer, and the value::

    tag  field              value
    'K'  scheme             KEY_SCHEME, ASCII
    'T'  kind               what the media are: "image", UTF-8
    'F'  fingerprint        UTF-8
    'V'  variant            UTF-8, empty where the architecture has no variants
    'P'  processor kwargs   canonical JSON, see `canonical_json`; "{}" for none
    'S'  salt               UTF-8; the whole field is left out when there is no salt
    'C'  content            BLAKE3-256 of the media bytes as the client sent them, after decoding base64

Fields come in this order, each exactly once (the salt at most once). Because every length is written
before its value, no two different inputs give the same text, whatever their values contain.
`tests/cache/key_vectors.json` lists inputs and their keys for implementations in other languages.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import blake3

from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import InvalidRequestError

KEY_SCHEME = "trtllm-mm-cache/key/3"

_DIGEST_BYTES = 32
_INT32S = struct.Struct(">8i")
# Below this size waking the worker threads costs more than they save.
_THREADED_BYTES = 1024 * 1024

Buffer = bytes | bytearray | memoryview

Kind = Literal["image"]
"""What an item is; video and audio clips will be others."""


@dataclass(frozen=True, slots=True)
class EmbeddingKey:
    """The 256-bit name of one embedding. Hashable, immutable, equal when the digests are equal."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != _DIGEST_BYTES:
            raise InvalidRequestError(f"a key has {_DIGEST_BYTES} bytes, not {len(self.digest)}")

    @classmethod
    def from_hex(cls, text: str) -> EmbeddingKey:
        """Return the key that `hex` wrote. Raises `InvalidRequestError` for anything else."""
        try:
            return cls(bytes.fromhex(text))
        except ValueError as error:
            raise InvalidRequestError("a key is written as 64 hexadecimal digits") from error

    @property
    def hex(self) -> str:
        """64 lower-case hexadecimal digits: the name under which the manager files the entry."""
        return self.digest.hex()

    @property
    def int32s(self) -> tuple[int, ...]:
        """Eight signed 32-bit integers, each read big-endian from four bytes of the digest.

        This is what TensorRT-LLM's `hexdigest_to_int32` makes of `hex`, the form in which it takes
        a multimodal hash.
        """
        return _INT32S.unpack(self.digest)

    def __str__(self) -> str:
        return self.hex


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Write processor kwargs so that equal kwargs give equal bytes: JSON, UTF-8, keys sorted, no spaces.

    Keys sort by code point. Tuples are written as lists. Integers and floats differ (`1` and `1.0`),
    floats are written as Python's `repr` does, the shortest text that reads back to the same double.

    Raises `InvalidRequestError` for NaN, infinities, keys that are no strings, lone surrogates and
    values JSON does not have: two of those could compare unequal and still be written alike.
    """
    try:
        _refuse_other_keys(value)
        text = json.dumps(
            dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"mm_processor_kwargs cannot be written as JSON: {error}") from error


def content_digest(media: Buffer) -> bytes:
    """Return the 32 bytes of BLAKE3 over `media`.

    Costs about 0.3 ms a MiB: call it off the event loop for more than some 100 KiB. Thread-safe; releases
    the GIL while it hashes.
    """
    threads = blake3.blake3.AUTO if len(media) >= _THREADED_BYTES else 1
    return blake3.blake3(media, max_threads=threads).digest()


def embedding_key(
    content: bytes,
    *,
    fingerprint: str,
    kind: Kind = "image",
    processor_kwargs: Mapping[str, Any] | None = None,
    scope: Scope = Scope(),
    variant: str = "",
) -> EmbeddingKey:
    """Return the key of what the encoder `fingerprint` makes of the media with the digest `content`.

    Of `scope` only the salt counts; None and "" are different. `processor_kwargs` None equals `{}`.
    Thread-safe. Raises `InvalidRequestError` when a text or the kwargs cannot be written down
    unambiguously (see `canonical_json`), or `content` is no digest.
    """
    if len(content) != _DIGEST_BYTES:
        raise InvalidRequestError(f"a digest of media has {_DIGEST_BYTES} bytes, not {len(content)}")
    hasher = blake3.blake3()
    _add_field(hasher, b"K", KEY_SCHEME.encode("ascii"))
    _add_field(hasher, b"T", _utf8("kind", kind))
    _add_field(hasher, b"F", _utf8("fingerprint", fingerprint))
    _add_field(hasher, b"V", _utf8("variant", variant))
    _add_field(hasher, b"P", canonical_json(processor_kwargs or {}))
    if scope.salt is not None:
        _add_field(hasher, b"S", _utf8("cache_salt", scope.salt))
    _add_field(hasher, b"C", content)
    return EmbeddingKey(hasher.digest())


def _add_field(hasher: blake3.blake3, tag: bytes, value: bytes) -> None:
    hasher.update(tag + len(value).to_bytes(8, "big"))
    hasher.update(value)


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} holds characters that UTF-8 cannot write") from error


def _refuse_other_keys(value: Any) -> None:
    """json.dumps turns the keys 1, True and None into strings, so that {1: x} and {"1": x} would collide."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidRequestError(f"mm_processor_kwargs has a key that is no string: {key!r}")
            _refuse_other_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner)
