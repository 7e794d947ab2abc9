"""Every reader of what comes from outside, fed with damaged and made-up input: errors of ours, or success.

`make fuzz` runs the same with FUZZ_EXAMPLES many examples a parser. A failure prints the example; put it into
`corpus/` or the parser's own tests.
"""

from __future__ import annotations

import copy
import os
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.media.conftest import check_politeness
from tests.pd import test_request
from tests.runtime import test_messages
from trtllm_mm_cache.errors import InvalidRequestError, MmCacheError, ProtocolMismatchError, TransferError
from trtllm_mm_cache.media import decode_image, probe_image
from trtllm_mm_cache.media.data_url import decode_data_url
from trtllm_mm_cache.media.freshness import FIELDS, Moment, Reuse
from trtllm_mm_cache.pd.request import parse_request
from trtllm_mm_cache.runtime.messages import EncodeFault, EncodeReady, EncodeRequest, parse, parse_answer
from trtllm_mm_cache.settings import ImageLimits
from trtllm_mm_cache.transfer import PeerMetadata

# In the service Pillow's warnings are dropped; here pytest would turn them into errors.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
SECONDS = 5
LIMITS = ImageLimits(max_image_megapixels=1, max_file_size_mb=1)
MEMORY = 64 * 1024**2

CORPUS = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").iterdir())}

EDGES = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"]

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=SECONDS * 1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.sampled_from([2**63, 2**64, -1, 0, "", "ab" * 32, "../../etc/passwd", "\x00", "\ud800"])
)
keys = st.text(max_size=8) | st.integers() | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a message with each of its keys or positions."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    return [(value, key) for key in keys] + [spot for key in keys for spot in spots(value[key])]


@st.composite
def damaged(draw: st.DrawFn, message: dict[str, Any]) -> dict[str, Any]:
    """A well-formed message of which some values, at any depth, are replaced or lost."""
    changed = copy.deepcopy(message)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(spots(changed) or [(changed, "new")]))
        if isinstance(container, dict) and draw(st.booleans()):
            container.pop(key, None)
        else:
            container[key] = draw(values)
    return changed


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """A real file with bytes overwritten, taken out, doubled or cut off."""
    data = bytearray(draw(st.sampled_from(list(CORPUS.values()))))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.binary(min_size=1, max_size=8) | st.sampled_from(EDGES))
        change = draw(st.sampled_from(["overwrite", "insert", "remove", "double", "cut"]))
        if change == "overwrite":
            data[at : at + len(piece)] = piece
        elif change == "insert":
            data[at:at] = piece
        elif change == "remove":
            del data[at : at + 16]
        elif change == "double":
            data[at:at] = data[at : at + 64]
        else:
            del data[max(at, 4) :]
    # A PNG's checksums stop what is broken by chance, and nobody who breaks it on purpose.
    return with_checksums(bytes(data)) if draw(st.booleans()) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """The same file, with the checksum that each of its chunks has to have where it is a PNG."""
    mended, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        mended[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")[: max(0, len(data) - end)]
        at = end + 4
    return bytes(mended)


def outcome(kinds: tuple[type[MmCacheError], ...], work: Callable[[], object]) -> MmCacheError | None:
    """Run `work` within MEMORY; return the error, which may be of these kinds alone, if there is one."""
    failure = None
    tracemalloc.start()
    try:
        work()
    except kinds as error:
        failure = error
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MEMORY
    assert len(str(failure)) < 5000
    return failure


@fuzz
@given(mangled())
def test_images(data: bytes) -> None:
    for read in (probe_image, decode_image):
        failure = outcome((MmCacheError,), partial(read, data, LIMITS))
        if failure is not None:
            check_politeness(failure)


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_itself_is_whole(name: str) -> None:
    assert decode_image(CORPUS[name], LIMITS).mode == "RGB"


@fuzz
@given(st.text(alphabet="data:;base64,ABab01+/=% \n-_é\x00", max_size=200), st.integers(0, 200))
def test_data_urls(text: str, limit: int) -> None:
    outcome((MmCacheError,), lambda: decode_data_url(f"data:{text}", limit))


HEADER_WORDS = [
    "max-age=60",
    "no-store",
    "no-cache",
    '"',
    ",",
    "=",
    "9" * 30,
    "GMT",
    "Thu, 01 Jan 2037 00:00:00 GMT",
]
header_lines = st.lists(st.text(max_size=20) | st.sampled_from(HEADER_WORDS), max_size=5).map(" ".join)


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), st.lists(header_lines, max_size=3).map(tuple)))
def test_headers_about_caching(fields: dict[str, tuple[str, ...]]) -> None:
    start = Moment(1_800_000_000, 0)
    reuse = Reuse.of(fields, asked=start, received=start)
    assert reuse.lifetime >= 0
    assert reuse.initial_age >= 0
    assert not (reuse.storable and any(line == "no-store" for line in fields.get("cache-control", ())))
    again = reuse.renewed(fields, asked=start, received=start)
    assert again is None or again.lifetime == reuse.lifetime


@fuzz
@given(damaged(test_request.wire()) | values)
def test_requests(payload: Any) -> None:
    outcome((InvalidRequestError,), lambda: parse_request(payload, "id", max_images=4))


@fuzz
@given(damaged(test_messages.request()) | values)
def test_what_a_pd_worker_asks(payload: Any) -> None:
    outcome((ProtocolMismatchError,), lambda: parse(EncodeRequest, payload))


@fuzz
@given(damaged(test_messages.ready()) | values)
def test_what_an_encode_worker_answers(payload: Any) -> None:
    outcome((ProtocolMismatchError,), lambda: parse(EncodeReady, payload))


FAULT = {"version": 2, "status": "error", "code": "invalid_image", "message": "truncated"}


@fuzz
@given(damaged(FAULT))
def test_what_an_encode_worker_reports(payload: Any) -> None:
    outcome((ProtocolMismatchError,), lambda: parse(EncodeFault, payload))
    outcome((MmCacheError,), lambda: parse_answer(payload))


PEER = PeerMetadata.of("agent", bytes(range(200))).to_wire()


@fuzz
@given(damaged(PEER))
def test_peer_metadata(payload: Any) -> None:
    outcome((ProtocolMismatchError, TransferError), lambda: PeerMetadata.from_wire(payload))
