"""What a body becomes: the JSON object that the client sent, with its images' bytes beside it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.frontend.body import MAX_JSON_BYTES, Body, parse_body

LONG = 4096  # URLs from this length on are cut out

words = st.sampled_from(["data:", '"data:', '"', "\\", "/", ",", "[{", "é", "\u2028", "cut-", "x" * 40, "\n"])
short_texts = st.lists(words, max_size=6).map("".join)
data_urls = st.builds(
    lambda kind, fill, length: (f"data:{kind};base64," + fill * length)[: max(length, 5)],
    st.sampled_from(["image/png", "", "text/plain"]),
    st.sampled_from(["A", "/+", "=", "é", '"', "\\", "a\\/"]),
    st.sampled_from([1, 40, LONG - 2, LONG - 1, LONG, LONG + 1, 3 * LONG]),
)
texts = short_texts | data_urls | st.tuples(short_texts, data_urls).map("".join)
values = st.recursive(
    texts
    | st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
parts = st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | st.fixed_dictionaries(
    {
        "type": st.just("image_url"),
        "image_url": st.fixed_dictionaries({"url": data_urls | texts}, optional={"detail": texts}),
    }
)
messages = st.fixed_dictionaries(
    {"content": st.lists(parts, max_size=4) | texts}, optional={"name": texts, "role": texts}
)
objects = st.dictionaries(texts, values, max_size=3) | st.builds(
    lambda said, more: {**more, "messages": said},
    st.lists(messages | values, max_size=3),
    st.dictionaries(texts, values, max_size=2),
)


def restored(body: Body) -> Any:
    """Put the URLs that were cut out back into their places."""

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return body.cut[value].decode() if value in body.cut else value
        if isinstance(value, list):
            return [whole(each) for each in value]
        if isinstance(value, dict):
            return {whole(name): whole(each) for name, each in value.items()}
        return value

    return whole(body.fields)


def spelt(text: str, spelling: int) -> str:
    """Write JSON another way: `/` as `\\/`, `data:` with an escape, spaces around everything."""
    if spelling & 1:
        text = text.replace("/", "\\/")
    if spelling & 2:
        text = text.replace('"data:', '"\\u0064ata:', 1)
    return f" \t{text}\r\n" if spelling & 4 else text


@given(objects, st.booleans(), st.integers(0, 7), st.sampled_from([None, 1]))
@settings(max_examples=300, deadline=None)
async def test_a_body_is_what_it_is_as_json(
    asked: Any, ascii_only: bool, spelling: int, indent: int | None
) -> None:
    raw = spelt(json.dumps(asked, ensure_ascii=ascii_only, indent=indent), spelling).encode()
    expected = json.loads(raw)
    body = await parse_body(bytearray(raw))
    assert restored(body) == expected


@given(objects)
@settings(max_examples=200, deadline=None)
async def test_only_urls_of_images_are_cut_out(asked: Any) -> None:
    body = await parse_body(bytearray(json.dumps(asked).encode()))
    urls = [
        part["image_url"]["url"]
        for message in body.fields.get("messages", [])
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and isinstance(part.get("image_url"), dict) and "url" in part["image_url"]
    ]
    assert body.cut.keys() <= {url for url in urls if isinstance(url, str)}
    everywhere = json.dumps(body.fields)
    assert len(re.findall(r"cut-[0-9a-f]{16}-\d+", everywhere)) == len(body.cut)


async def test_an_images_url_is_not_among_the_text() -> None:
    url = "data:image/png;base64," + "A" * (2 * MAX_JSON_BYTES)
    for escaped in (url, url.replace("/", "\\/")):
        message = '{"messages":[{"content":[{"type":"image_url","image_url":{"url":"' + escaped + '"}}]}]}'
        body = await parse_body(bytearray(message.encode()))
        assert list(body.cut.values()) == [url.encode()]
        assert len(json.dumps(body.fields)) < 200


async def test_the_raw_body_is_emptied() -> None:
    raw = bytearray(b'{"a": "' + b"x" * 100_000 + b'"}')
    await parse_body(raw)
    assert not raw


URL = "data:image/png;base64," + "A" * MAX_JSON_BYTES
NOT_IMAGES: dict[str, Any] = {
    "text": {"messages": [{"content": [{"type": "text", "text": URL}]}]},
    "content": {"messages": [{"content": URL}]},
    "prompt": {"prompt": URL},
    "stop": {"stop": [URL]},
    "salt": {"cache_salt": URL},
    "name of a field": {URL: 1},
    "image_url without its object": {"messages": [{"content": [{"image_url": URL}]}]},
    "an image elsewhere": {"images": [{"image_url": {"url": URL}}]},
}


@pytest.mark.parametrize("place", NOT_IMAGES)
async def test_what_only_looks_like_an_image_counts_as_text(place: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_JSON_BYTES} are taken"):
        await parse_body(bytearray(json.dumps(NOT_IMAGES[place]).encode()))


async def test_many_such_texts_count_together() -> None:
    many = {"messages": [{"content": URL[: MAX_JSON_BYTES // 4]}] * 5}
    with pytest.raises(InvalidRequestError, match="are taken"):
        await parse_body(bytearray(json.dumps(many).encode()))


REFUSED: dict[str, tuple[bytes, str]] = {
    "text above the bound": (b'{"a":"' + b"x" * MAX_JSON_BYTES + b'"}', "at most 4194304 are taken"),
    "many values": (b"[" + b"1," * 200_000 + b"1]", "more than 200000 JSON values"),
    "many lists": (b'{"a":' + b"[" * 200_001, "more than 200000 JSON values"),
    "many objects": (b'{"a":[' + b"{}," * 200_001, "more than 200000 JSON values"),
    "many, after text that never ends": (
        b'["\\"' + b'\\"' * 100_000 + b'",' + b"1," * 200_001 + b'"\\',
        "200000",
    ),
    "nothing": (b"", "not JSON"),
    "half": (b'{"a": ', "not JSON"),
    "two": (b"{}{}", "not JSON"),
    "nan": (b'{"a": NaN}', "not JSON"),
    "infinity": (b'{"a": -Infinity}', "not JSON"),
    "depth": (b'{"a":' + b"[" * 100_000, "not JSON"),
    "bytes that are no text": (b'{"a": "\xff\xfe"}', "not JSON"),
    "half a character": (b'{"a": "\\ud800"}', "not JSON"),
    "a comment": (b"{} // done", "not JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "a text": (b'"data:,"', "must be a JSON object"),
    "a number of many digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "a URL that never ends": (b'{"a": "data:' + b"A" * 9000, "not JSON"),
    "a URL with a line break": (b'{"a": "data:\n' + b"A" * 9000 + b'"}', "not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_request_is_refused_in_words(name: str) -> None:
    raw, says = REFUSED[name]
    with pytest.raises(InvalidRequestError, match=says) as caught:
        await parse_body(bytearray(raw))
    assert len(str(caught.value)) < 400


async def test_commas_in_a_text_are_no_values() -> None:
    table = "1,2,3\n" * 150_000
    body = await parse_body(bytearray(json.dumps({"prompt": table, "more": 'quote " and \\'}).encode()))
    assert body.fields["prompt"] == table
