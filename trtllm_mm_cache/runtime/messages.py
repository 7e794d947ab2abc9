"""What a PD worker and an encode worker say to each other over Dynamo's request plane.

One call asks for one embedding; the answer is one message, either `EncodeReady` or an error.
The image travels in the request (the request plane carries bytes as they are); the embedding never
does: `EncodeReady` only says where the PD worker may READ it.

Every message is validated on arrival: unknown fields, wrong types and sizes beyond the bounds below
are a `ProtocolMismatchError`, and nothing is unpickled.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import Kind
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MmCacheError, ProtocolMismatchError, from_wire
from trtllm_mm_cache.runtime.processor_kwargs import check_processor_kwargs

PROTOCOL_VERSION: Final = 2

ENCODE: Final = "encode"
"""The purpose of a PD worker's call of an encode worker, for `membership`."""

MAX_EMBEDDING_BYTES = 4 * 1024**3
MAX_MEDIA_BYTES = 1024**3
"""The most that `--max-file-size-mb` can be set to; each worker has its own, smaller limit besides."""

MAX_PLACEHOLDER_CHARACTERS = 4 * 1024**2
"""A placeholder's text has some 13 characters a row."""

_TUPLES = ("shape", "grid_thw", "adapters")
_Side = Annotated[int, Field(gt=0, lt=2**31)]

SaltTag = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
ProcessorKwargs = Annotated[dict[str, Any], AfterValidator(check_processor_kwargs)]
HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Message(BaseModel):
    """Base of all messages: immutable, strictly typed, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EncodeRequest(Message):
    """Asks for the embedding of one item.

    `fingerprint` is the asker's: an encode worker that serves another model refuses.
    `media` are the image file's bytes; the encode worker decodes them itself. Without `retain` the
    embedding is gone when this call's READ is over. `fresh`: an embedding of this key was just found wrong,
    so one that lies there already will not do. `salt_tag` stands for the request's salt (`cache.salt`), so
    that all of a tenant can be dropped. `trace_headers` are the asker's span (W3C trace context).
    """

    version: Literal[2] = PROTOCOL_VERSION
    fingerprint: HexDigest
    key: HexDigest
    kind: Kind = "image"
    media: bytes = Field(max_length=MAX_MEDIA_BYTES)
    processor_kwargs: Annotated[dict[str, Any], AfterValidator(check_processor_kwargs)] = Field(
        default_factory=dict
    )
    variant: str = Field("", max_length=64)
    retain: bool = True
    fresh: bool = False
    salt_tag: SaltTag | None = None
    trace_headers: dict[str, str] = Field(default_factory=dict, max_length=2)

    @property
    def scope(self) -> Scope:
        """The item's scope as an encode worker knows it: without the salt."""
        return Scope(tag=None if self.salt_tag is None else bytes.fromhex(self.salt_tag), retain=self.retain)


class EncodeCancel(Message):
    """Takes back the call whose context has the id `cancel`; it has no answer of its own.

    A call that is answered already is not undone: the answer comes, and the asker releases the export.
    """

    version: Literal[2] = PROTOCOL_VERSION
    cancel: str = Field(min_length=1, max_length=128)


class EncodeReady(Message):
    """Says that the embedding lies in the encode worker's arena, pinned until the READ's notification.

    `fingerprint` is that of the model which made it and `key` the one that was asked for: the PD worker
    compares both. `peer` is the NIXL metadata with its digest; `token` is the READ's notification;
    `checksum` is XXH3-64 over the `nbytes` at `address`. `dtype` is a torch dtype name without the prefix.
    `grid_thw` and `placeholder` are the engine's, as in `EmbeddingMetadata`. `encode_seconds` is what the
    vision tower took for it, when it was encoded.
    `origin` tells what this call cost: an encode, a flight that another call had started, or nothing.
    """

    version: Literal[2] = PROTOCOL_VERSION
    status: Literal["ready"] = "ready"
    fingerprint: HexDigest
    key: HexDigest
    peer: dict[str, Any]
    token: str = Field(max_length=128)
    address: int = Field(gt=0, lt=2**64)
    nbytes: int = Field(gt=0, le=MAX_EMBEDDING_BYTES)
    checksum: int = Field(ge=0, lt=2**64)
    dtype: str = Field(max_length=32)
    shape: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    grid_thw: tuple[_Side, _Side, _Side] | None = None
    placeholder: str | None = Field(None, max_length=MAX_PLACEHOLDER_CHARACTERS)
    encode_seconds: float = Field(ge=0, allow_inf_nan=False)
    origin: Literal["encoded", "joined", "cached"]

    @property
    def metadata(self) -> EmbeddingMetadata:
        """What the cache keeps with the embedding."""
        return EmbeddingMetadata(self.grid_thw, self.placeholder, self.encode_seconds, self.checksum)

    def check_answers(self, request: EncodeRequest) -> None:
        """Raise `ProtocolMismatchError` unless this is the embedding that `request` asked for."""
        if self.fingerprint != request.fingerprint:
            raise ProtocolMismatchError(
                "the encode worker offers an embedding of another model, engine, stored dtype or background; "
                "start both workers with the same --model-path, --engine, embedding dtype and "
                "--transparent-background"
            )
        if self.key != request.key:
            raise ProtocolMismatchError("the encode worker offers the embedding of another item")


class EncodeFault(Message):
    """Says why there is no embedding: `code` and `message` of an `MmCacheError`."""

    version: Literal[2] = PROTOCOL_VERSION
    status: Literal["error"] = "error"
    code: str = Field(max_length=64)
    message: str = Field(max_length=4096)

    @classmethod
    def of(cls, error: MmCacheError) -> EncodeFault:
        """Describe `error` for the other side."""
        return cls(code=error.code, message=error.message[:4096])


AnyMessage = TypeVar("AnyMessage", bound=Message)


def parse(kind: type[AnyMessage], payload: Any) -> AnyMessage:
    """Validate `payload` as a `kind`; raises `ProtocolMismatchError` that names the fields at fault."""
    try:
        return kind.model_validate(_with_tuples(payload))
    except ValidationError as error:
        fields = ", ".join(
            sorted({".".join(str(part) for part in problem["loc"]) for problem in error.errors()})
        )
        raise ProtocolMismatchError(
            f"the other worker's {kind.__name__} is not what protocol version {PROTOCOL_VERSION} says "
            f"(fields: {fields or 'the message itself'}); run the same release on both workers"
        ) from None


def parse_answer(payload: Any) -> EncodeReady:
    """Read an encode worker's answer; raises the error it reports, or `ProtocolMismatchError`."""
    if isinstance(payload, dict) and payload.get("status") == "error":
        fault = parse(EncodeFault, payload)
        raise from_wire({"code": fault.code, "message": fault.message})
    return parse(EncodeReady, payload)


def _with_tuples(payload: Any) -> Any:
    # The wire has lists only; strict validation wants the tuples that these are.
    if not isinstance(payload, dict):
        return payload
    tuples = {name: tuple(payload[name]) for name in _TUPLES if isinstance(payload.get(name), list)}
    return payload | tuples if tuples else payload
