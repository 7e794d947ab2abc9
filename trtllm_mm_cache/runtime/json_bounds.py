"""How large a JSON value from outside may be, checked before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST_INTEGER = 2**64


@dataclass(frozen=True)
class JsonBounds:
    """Bounds on one JSON object: values in all, depth, characters of all its strings and keys together."""

    values: int
    depth: int
    characters: int

    def check(self, value: Any) -> None:
        """Raise `ValueError` unless `value` is a JSON object within these bounds.

        Takes time for at most `values` values, however many there are. Keys must be strings; bytes, NaN,
        infinities and integers beyond 64 bits are no JSON here.
        """
        if not isinstance(value, Mapping):
            raise ValueError("must be an object")  # noqa: TRY004 - one kind of error for one check
        values, characters = 0, 0
        # Breadth first, so that a deep value costs no Python frames.
        level: list[Any] = [value]
        for _ in range(self.depth):
            inner: list[Any] = []
            for each in level:
                values += 1
                if isinstance(each, str):
                    characters += len(each)
                elif isinstance(each, Mapping):
                    if len(each) + values + len(inner) > self.values:
                        raise ValueError(self._too_many())
                    characters += sum(len(_checked_key(key)) for key in each)
                    inner += each.values()
                elif isinstance(each, list | tuple):
                    if len(each) + values + len(inner) > self.values:
                        raise ValueError(self._too_many())
                    inner += each
                else:
                    _check_scalar(each)
                if characters > self.characters:
                    raise ValueError(f"must hold at most {self.characters} characters")
            if not inner:
                return
            level = inner
        raise ValueError(f"must not be nested deeper than {self.depth} levels")

    def _too_many(self) -> str:
        return f"must hold at most {self.values} values"


def _checked_key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError("must have strings as keys")  # noqa: TRY004
    return key


def _check_scalar(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) >= _LARGEST_INTEGER:
            raise ValueError("must not hold integers beyond 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("must not hold NaN or infinities")
    else:
        raise ValueError("must hold JSON values only")  # noqa: TRY004


PROCESSOR_KWARGS = JsonBounds(values=256, depth=8, characters=8192)
"""What a client asks of the image processor: a handful of numbers."""
