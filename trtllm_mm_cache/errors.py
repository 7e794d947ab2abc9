"""The error tree: who is to blame, which HTTP status, and whether a retry can help::

    MmCacheError
    ├── RequestError                 the client's request is at fault
    │   ├── InvalidRequestError          400  a field has the wrong type or value
    │   ├── PlaceholderMismatchError     400  images and placeholders in the prompt disagree
    │   ├── MediaReferenceError          400  the reference cannot be parsed or has no such scheme
    │   ├── MediaForbiddenError          400  private address, path outside the allowed folder
    │   ├── MediaFetchError              400  the media server answered with an error, or not at all
    │   ├── MediaTooLargeError           413  more bytes or pixels than the limits allow
    │   ├── UnsupportedMediaError        415  not one of the accepted image formats
    │   ├── InvalidImageError            400  broken, truncated or hostile image
    │   ├── UnknownModelError            404  no model of that name is served
    │   └── RequestTimeoutError          408  the body did not arrive in time
    ├── OverloadedError              503  a process has as much under way as it may (retryable)
    ├── PdUnavailableError           503  no PD worker is alive, or none takes the request (retryable)
    │   └── PdLostError              503  the PD worker went away in the middle of an answer (retryable)
    ├── EncodeError                  the encode side could not deliver
    │   ├── EncodeUnavailableError       503  no encode worker is alive (retryable)
    │   │   └── EncodeUnreachableError   503  this one cannot be connected to (retryable)
    │   ├── EncodeOverloadedError        503  its queue or arena is full (retryable)
    │   ├── EncodeTimeoutError           504  no answer within the deadline (retryable)
    │   ├── EncodeFailedError            502  the vision tower failed on this item (retryable)
    │   ├── InvalidEmbeddingError        502  the vision tower made NaN or infinity of this item (retryable)
    │   └── ProtocolMismatchError        502  other protocol version or other model fingerprint
    ├── TransferError                the bytes did not arrive as promised (all retryable)
    │   ├── TransferTimeoutError         504  a READ had not settled at its deadline
    │   ├── PeerLostError                503  the exporting process is gone
    │   ├── ChecksumMismatchError        502  bytes differ from what was exported
    │   └── EmbeddingMismatchError       502  size, shape, dtype, rows or width disagree
    ├── NotAMemberError              502  another process did not prove that it belongs to the deployment
    ├── GenerationError              500  the engine failed on a request that it had accepted
    ├── EngineLostError              503  the engine's own process ended; the worker ends, to be restarted
    ├── CacheError                   the cache core refuses
    │   ├── EntryTooLargeError           507  one entry larger than the arena
    │   ├── ArenaFullError               503  every byte that could be freed is leased (retryable)
    │   ├── LoadAbortedError             503  the flight everybody waited for was stopped (retryable)
    │   └── IntegrityError               500  an invariant of the cache does not hold
    ├── DiscoveryLostError           500  the worker fell out of discovery; it ends, to be restarted
    └── ConfigurationError           500  the operator's settings are at fault; raised at start
        └── SharedMemoryError            500  the shared-memory file system is too small

Every error carries a sentence that names the thing, the reason and the way out, and never a URL,
a path of the server, image bytes or a secret. `code` is stable and travels between workers:
`to_wire` and `from_wire` are exact inverses for it.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MmCacheError(Exception):
    """Root of every error this package raises on purpose.

    `message` is fit for the client. `item_index` is the 0-based position of the item at fault among the
    request's items of its `kind`, or None.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, item_index: int | None = None, kind: str = "image") -> None:
        super().__init__(message)
        self.message = message
        self.item_index = item_index
        self.kind = kind

    def __str__(self) -> str:
        if self.item_index is None:
            return self.message
        return f"{self.kind} {self.item_index + 1}: {self.message}"

    def for_item(self, item_index: int, kind: str = "image") -> MmCacheError:
        """Return an equal error that names the item at `item_index` (0-based) of its kind."""
        return type(self)(self.message, item_index=item_index, kind=kind)

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON-safe form that workers exchange."""
        return {"code": self.code, "message": self.message}


class RequestError(MmCacheError):
    """The client's request is at fault; sending it again unchanged cannot help."""

    code = "request_error"
    http_status = 400


class InvalidRequestError(RequestError):
    """A field of the request has the wrong type or value."""

    code = "invalid_request"


class PlaceholderMismatchError(RequestError):
    """The prompt holds another number of image placeholders than the request has images."""

    code = "placeholder_mismatch"


class MediaReferenceError(RequestError):
    """The media reference cannot be parsed, or its scheme is not served."""

    code = "media_reference"


class MediaForbiddenError(RequestError):
    """The media reference points where this server does not go."""

    code = "media_forbidden"


class MediaFetchError(RequestError):
    """The media server answered with an error, or not within the deadline."""

    code = "media_fetch"


class MediaTooLargeError(RequestError):
    """The media has more bytes or pixels than the limits allow."""

    code = "media_too_large"
    http_status = 413


class UnsupportedMediaError(RequestError):
    """The media is not one of the accepted image formats."""

    code = "unsupported_media"
    http_status = 415


class InvalidImageError(RequestError):
    """The image is broken, truncated or hostile."""

    code = "invalid_image"


class UnknownModelError(RequestError):
    """No model of that name is served."""

    code = "model_not_found"
    http_status = 404


class RequestTimeoutError(RequestError):
    """The request's body did not arrive in time."""

    code = "request_timeout"
    http_status = 408


class PdUnavailableError(MmCacheError):
    """No PD worker is alive, or none of them takes the request."""

    code = "pd_unavailable"
    http_status = 503
    retryable = True


class PdLostError(PdUnavailableError):
    """The PD worker went away in the middle of an answer."""

    code = "pd_lost"


class OverloadedError(MmCacheError):
    """A process has as many requests or as many bytes of them under way as its settings allow."""

    code = "overloaded"
    http_status = 503
    retryable = True


class EncodeError(MmCacheError):
    """The encode side could not deliver an embedding."""

    code = "encode_error"
    http_status = 502
    retryable = True


class EncodeUnavailableError(EncodeError):
    """No encode worker is alive."""

    code = "encode_unavailable"
    http_status = 503


class EncodeUnreachableError(EncodeUnavailableError):
    """The encode worker cannot be connected to: it has not seen the image."""

    code = "encode_unreachable"


class EncodeOverloadedError(EncodeError):
    """The encode worker's queue or arena is full."""

    code = "encode_overloaded"
    http_status = 503


class EncodeTimeoutError(EncodeError):
    """The encode worker did not answer within the deadline."""

    code = "encode_timeout"
    http_status = 504


class EncodeFailedError(EncodeError):
    """The vision tower failed on this item."""

    code = "encode_failed"


class InvalidEmbeddingError(EncodeError):
    """The vision tower made NaN or infinity of this item: it speaks of the item, not of the worker."""

    code = "invalid_embedding"


class ProtocolMismatchError(EncodeError):
    """The other worker speaks another protocol version or serves another model."""

    code = "protocol_mismatch"
    retryable = False


class TransferError(MmCacheError):
    """The embedding's bytes did not arrive as promised."""

    code = "transfer_error"
    http_status = 502
    retryable = True


class TransferTimeoutError(TransferError):
    """A READ had not settled at its deadline."""

    code = "transfer_timeout"
    http_status = 504


class PeerLostError(TransferError):
    """The exporting process is gone."""

    code = "peer_lost"
    http_status = 503


class ChecksumMismatchError(TransferError):
    """The bytes that arrived differ from those that were exported."""

    code = "checksum_mismatch"


class EmbeddingMismatchError(TransferError):
    """Size, shape, dtype, row count or hidden width disagree with what was announced or expected."""

    code = "embedding_mismatch"


class NotAMemberError(MmCacheError):
    """Another process did not prove that it belongs to this deployment: asking it again cannot help."""

    code = "not_a_member"
    http_status = 502


class GenerationError(MmCacheError):
    """The engine failed on a request that it had accepted."""

    code = "generation_error"


class EngineLostError(MmCacheError):
    """The engine computes in processes of its own and one of them ended: the worker ends too."""

    code = "engine_lost"
    http_status = 503
    retryable = True


class CacheError(MmCacheError):
    """The cache core refuses an operation."""

    code = "cache_error"


class EntryTooLargeError(CacheError):
    """One entry is larger than the whole arena."""

    code = "entry_too_large"
    http_status = 507


class ArenaFullError(CacheError):
    """Every byte that could make room is leased, reserved or quarantined."""

    code = "arena_full"
    http_status = 503
    retryable = True


class LoadAbortedError(CacheError):
    """The flight that the request waited for was stopped before it had an outcome."""

    code = "load_aborted"
    http_status = 503
    retryable = True


class IntegrityError(CacheError):
    """An invariant of the cache does not hold: a defect in this package."""

    code = "integrity"


class DiscoveryLostError(MmCacheError):
    """The worker fell out of discovery; its process ends, for a supervisor to restart."""

    code = "discovery_lost"


class ConfigurationError(MmCacheError):
    """The operator's settings are at fault; raised at start, before anything is served."""

    code = "configuration"


class SharedMemoryError(ConfigurationError):
    """The shared-memory file system cannot hold the configured capacity."""

    code = "shared_memory"


def error_codes() -> list[str]:
    """Return the codes that workers can report, sorted: this file's, not the command line's own."""
    return sorted(code for code, error in _tree(MmCacheError).items() if error.__module__ == __name__)


def _tree(root: type[MmCacheError]) -> dict[str, type[MmCacheError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(payload: dict[str, Any]) -> MmCacheError:
    """Rebuild the error that `to_wire` described.

    An unknown code (a newer peer) becomes `EncodeFailedError`, with the code kept in the message.
    """
    code, message = str(payload.get("code", "")), str(payload.get("message", ""))
    kind = _tree(MmCacheError).get(code)
    if kind is None:
        return EncodeFailedError(f"the encode worker reported {code or 'an unnamed error'}: {message}")
    return kind(message)
