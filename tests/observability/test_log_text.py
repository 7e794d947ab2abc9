"""What a line of the log may hold, and that no input makes it slow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_mm_cache.observability.log_text import MAX_CHARACTERS, indented, one_line

ESCAPED = {
    "newline": ("a\n2026-01-01 00:00:00,000 ERROR forged", r"a\n2026-01-01 00:00:00,000 ERROR forged"),
    "carriage return": ("a\rb", r"a\rb"),
    "escape": ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    "C1": ("a\x9b31mb\x85c", r"a\x9b31mb\x85c"),
    "separators": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "bidirectional": ("\u202eabc\u2066\u200f", r"\u202eabc\u2066\u200f"),
    "surrogate": ("\ud800", r"\ud800"),
    "tab and nul": ("a\tb\0", r"a\tb\x00"),
    "readable": ("é 图 🐚 a\\nb", "é 图 🐚 a\\nb"),
}

URLS = {
    "query": ("GET http://h:80/p?token=s next", "GET http://h:80/p?… next"),
    "fragment": ("https://h/p#token=s", "https://h/p#…"),
    "user": ("http://name:s@h/p", "http://…@h/p"),
    "user with an @": ("http://name:s@s@h/p", "http://…@h/p"),
    "both": ("http://name:s@h/p?s", "http://…@h/p?…"),
    "in a field": ('url="http://h/p?token=s" n=1', 'url="http://h/p?… n=1'),
    "in brackets": ("for url (http://h/p?token=s)", "for url (http://h/p?…"),
    "two": ("http://h/a?s=s,http://h/b?s=s", "http://h/a?…"),
    "newline inside": ("http://h/p?a=1\ns=s", "http://h/p?…"),
    "file": ("file:///p/a.png?s", "file:///p/a.png?…"),
    "signed": ("s3://bucket/key?X-Amz-Signature=s", "s3://bucket/key?…"),
    "address": ("http://[::1]:8/p?s", "http://[::1]:8/p?…"),
    "target": ('"GET /v1/models?key=s HTTP/1.1" 200', '"GET /v1/models?… HTTP/1.1" 200'),
    "without scheme": ("host/path?key=s", "host/path?…"),
    "data": ("data:image/png;base64,c2VjcmV0 ends", "data:image/png;base64,… ends"),
    "data, quoted": ("{'url': 'data:image/png;base64,c2VjcmV0'}", "{'url': 'data:image/png;base64,…"),
    "data, plain": ("DATA:,s%20s", "DATA:,…"),
    "none": ("really? a=b 10:30 c/d data: x, y dyn://a.b.c", "really? a=b 10:30 c/d data: x, y dyn://a.b.c"),
}


@pytest.mark.parametrize("name", ESCAPED)
def test_what_is_not_printable_is_escaped(name: str) -> None:
    text, expected = ESCAPED[name]
    assert one_line(text) == expected


@pytest.mark.parametrize("name", URLS)
def test_the_private_parts_of_urls_are_left_out(name: str) -> None:
    text, expected = URLS[name]
    assert one_line(text) == expected


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_any_text_is_one_printable_line_and_is_not_changed_again(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line.splitlines()) <= 1
    assert one_line(line) == line


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_no_line_of_a_traceback_can_be_taken_for_another(text: str) -> None:
    assert all(line.startswith("  | ") and line.isprintable() for line in indented(text).splitlines())


def test_a_line_is_cut_and_says_so() -> None:
    line = one_line("x" * MAX_CHARACTERS + "yyy")
    assert line == "x" * MAX_CHARACTERS + "… (3 more characters)"


@pytest.mark.parametrize(
    "unit", ["http://a@", "a://", "/", "/a?", "data:", "data:a;", "?", "a.b-", "http://?#", "\x1b"]
)
def test_no_text_makes_a_line_slow(unit: str) -> None:
    """Expressions that go back and forth would take minutes here, and the suite's time-out would end it."""
    for _ in range(20):
        assert one_line(unit * (MAX_CHARACTERS // len(unit)) + "!")
