"""What a log line may hold: one line of printable text, without the private parts of URLs.

Standard library alone: the relay's process (`log_relay.py`) imports this and nothing else of the package.
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 16 * 1024
"""Where a line is cut: no message of ours comes near it, and a client's text must not fill the disk."""

# A word is what stands between white space: a quote or bracket may be part of what a client sent.
_WORD = re.compile(r"\S+")
_QUERY = re.compile(r"\?")
_PRIVATE = re.compile(r"[?#]")
_USER = re.compile(r"(?<=://)[^/@]+(?:@[^/@]+)*@")
_DATA_URL = re.compile(r"\bdata:[\w.+/;=-]{0,256},", re.IGNORECASE)


def one_line(text: str) -> str:
    """Return `text` as one line that no reader, terminal or collector takes for anything else.

    Every character that is not printable (controls, line and paragraph separators, bidirectional marks,
    surrogates) becomes its escape as in Python's source. Of what looks like a URL the user, the query and the
    fragment are left out, of a data: URL its content. Cut after `MAX_CHARACTERS`.
    """
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}… ({len(text) - MAX_CHARACTERS} more characters)"
    if not text.isprintable():
        text = "".join(each if each.isprintable() else _escaped(each) for each in text)
    if "?" in text or ":" in text:
        text = _WORD.sub(_without_private_parts, text)
    return text


def indented(text: str) -> str:
    """Return `text` of several lines (a traceback) so that none of them can be taken for a log line."""
    return "\n".join(f"  | {one_line(line)}" for line in text.splitlines())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _without_private_parts(found: re.Match[str]) -> str:
    word = found.group()
    if data := _DATA_URL.search(word):
        return f"{word[: data.end()]}…"
    if (start := word.find("://")) >= 0:
        private = _PRIVATE.search(word, start)
    elif (start := word.find("/")) >= 0 and "=" in word:  # a request's target, or a URL without its scheme
        private = _QUERY.search(word, start)
    else:
        return word
    if private:
        word = f"{word[: private.end()]}…"
    return _USER.sub("…@", word)
