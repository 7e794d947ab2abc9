"""How long an HTTP response may be used again without asking its server (RFC 9111), by its headers alone.

For a private cache of complete GET responses that never uses a stale one. So of Cache-Control `no-store`,
`no-cache` and `max-age` alone make a difference: `must-revalidate`, `stale-while-revalidate` and
`stale-if-error` are about stale responses, `s-maxage`, `public`, `private` and `proxy-revalidate` about
shared caches. Where headers contradict each other or cannot be read the response is stale, and so it is
where none says how long it is fresh: no heuristic knows when an image will change.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar
from urllib.request import parse_http_list

FIELDS = ("age", "cache-control", "date", "etag", "expires", "last-modified", "pragma", "vary")
"""The header fields that decide about reuse."""

Fields = Mapping[str, tuple[str, ...]]
"""The lines of each of `FIELDS` that a response has."""

Value = TypeVar("Value")

_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")
_LONGEST = 2**31
"""Seconds: what RFC 9111 has for all that is longer."""


@dataclass(frozen=True)
class Moment:
    """A point in time, in seconds, by a clock that can be set, `wall`, since 1970, and one that cannot."""

    wall: float
    steady: float


Clock = Callable[[], Moment]


def now() -> Moment:
    """Return this moment."""
    return Moment(time.time(), time.monotonic())


@dataclass(frozen=True)
class Reuse:
    """What the headers of one response allow. Immutable.

    `lifetime` is how many seconds old it may become, 0 where it has to be asked for each time; `initial_age`
    how old it was when it was `received`. Not `storable`: it must not be kept at all.
    """

    fields: Fields
    received: Moment
    storable: bool
    lifetime: float
    initial_age: float

    @classmethod
    def of(cls, fields: Fields, *, asked: Moment, received: Moment) -> Reuse:
        """Judge a response whose request was sent at `asked` and whose head came in at `received`."""
        directives = _directives(fields.get("cache-control", ()))
        dates = fields.get("date", ())
        date = _date(dates[0]) if len(dates) == 1 else None
        apparent_age = 0.0 if date is None else max(0.0, received.wall - date)
        corrected_age = _first_age(fields) + max(0.0, received.steady - asked.steady)
        return cls(
            fields=fields,
            received=received,
            storable="no-store" not in directives,
            lifetime=_lifetime(fields, directives, received.wall if date is None else date),
            initial_age=max(apparent_age, corrected_age),
        )

    def is_fresh(self, at: Moment) -> bool:
        """Say whether it may be used `at` a moment without asking. Setting a clock makes nothing fresh."""
        here = max(at.steady - self.received.steady, at.wall - self.received.wall)
        return self.initial_age + here < self.lifetime

    @property
    def conditions(self) -> dict[str, str]:
        """Headers that ask whether the server still has this one; empty where nothing names it."""
        tags, dates = self.fields.get("etag", ()), self.fields.get("last-modified", ())
        validators = {"if-none-match": tags, "if-modified-since": dates}
        return {name: lines[0] for name, lines in validators.items() if len(lines) == 1}

    def renewed(self, fields: Fields, *, asked: Moment, received: Moment) -> Reuse | None:
        """Return what holds after a 304 with `fields`; None where the 304 is about another response."""
        if not _names_the_same(self.fields, fields):
            return None
        lasting = {name: lines for name, lines in self.fields.items() if name not in ("age", "date")}
        return Reuse.of({**lasting, **fields}, asked=asked, received=received)


def _lifetime(fields: Fields, directives: Mapping[str, list[str | None]], date: float) -> float:
    """Return how many seconds old a response that was made at `date` may become, 0 for none."""
    varies = ",".join(fields.get("vary", ()))
    if "no-cache" in directives or "*" in varies:
        return 0
    if not directives and any("no-cache" in line.lower() for line in fields.get("pragma", ())):
        return 0  # HTTP/1.0's way to say it, and still sent
    if "max-age" in directives:
        return _only(directives["max-age"], _seconds)
    if "expires" in fields:
        return max(0, _only(fields["expires"], _date) - date)
    return 0


def _directives(lines: Iterable[str]) -> dict[str, list[str | None]]:
    """Return the arguments of each Cache-Control directive, in order; None stands for no argument."""
    found: dict[str, list[str | None]] = {}
    for line in lines:
        # With a quotation mark that closes nothing, what follows must not hide in its argument.
        for each in parse_http_list(line) if line.count('"') % 2 == 0 else line.split(","):
            name, equals, argument = each.partition("=")
            found.setdefault(name.strip().lower(), []).append(argument.strip().strip('"') if equals else None)
    return found


def _only(values: Sequence[Value], read: Callable[[Value], float | None]) -> float:
    """Return the one number that `values` say, or 0 where they disagree or one cannot be read."""
    numbers = {read(each) for each in values}
    number = numbers.pop() if len(numbers) == 1 else None
    return 0 if number is None else number


def _first_age(fields: Fields) -> float:
    """Return the Age that caches before this one report; of a list the first counts, nonsense is none."""
    return _seconds(",".join(fields.get("age", ())).split(",")[0].strip()) or 0


def _seconds(text: str | None) -> float | None:
    """Read a number of seconds as HTTP has it: digits and nothing else."""
    if text is None or not (text.isascii() and text.isdigit()):
        return None
    return _LONGEST if len(text) > len(str(_LONGEST)) else min(int(text), _LONGEST)


def _date(text: str) -> float | None:
    """Read a date in any of HTTP's three forms, to seconds since 1970."""
    for form in _DATES:
        with contextlib.suppress(ValueError, OverflowError):
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
    return None


def _names_the_same(own: Fields, theirs: Fields) -> bool:
    """Say whether a 304 with the validators of `theirs` can be about a response with those of `own`."""
    for name in ("etag", "last-modified"):
        if name in own and name in theirs:
            return [_opaque(line) for line in own[name]] == [_opaque(line) for line in theirs[name]]
    return all(line.startswith("W/") for line in theirs.get("etag", ()))


def _opaque(tag: str) -> str:
    return tag.removeprefix("W/")
