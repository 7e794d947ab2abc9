"""How large `mm_processor_kwargs` may be, checked before anything is done with them.

A client asks the image processor for a handful of numbers. pydantic's `JsonValue` would check the types, but
neither depth nor size, and no wire between workers takes integers beyond 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_VALUES, _DEPTH, _CHARACTERS = 256, 8, 8192


def check_processor_kwargs(kwargs: Any) -> dict[str, Any]:
    """Return `kwargs` if it is a JSON object within the bounds; raise `ValueError` otherwise.

    The bounds are on values in all, on depth, and on the characters of all strings and keys together. Takes
    time for at most that many values, whatever comes.
    """
    if not isinstance(kwargs, dict):
        raise ValueError("must be an object")  # noqa: TRY004 - one kind of error for one check
    values = characters = 0
    level: list[Any] = [kwargs]  # breadth first, so that a deep value costs no Python frames
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for each in level:
            values += 1
            if isinstance(each, Mapping | list | tuple):
                if len(each) + values + len(inner) > _VALUES:
                    raise ValueError(f"must hold at most {_VALUES} values")
                if isinstance(each, Mapping):
                    if not all(isinstance(key, str) for key in each):
                        raise ValueError("must have strings as keys")
                    characters += sum(len(key) for key in each)
                    each = each.values()  # noqa: PLW2901
                inner += each
            elif isinstance(each, str):
                characters += len(each)
            elif not _is_number_or_none(each):
                raise ValueError("must hold JSON only: no NaN, infinity or integer beyond 64 bits")
            if characters > _CHARACTERS:
                raise ValueError(f"must hold at most {_CHARACTERS} characters")
        if not inner:
            return kwargs
        level = inner
    raise ValueError(f"must not be nested deeper than {_DEPTH} levels")


def _is_number_or_none(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**64)
