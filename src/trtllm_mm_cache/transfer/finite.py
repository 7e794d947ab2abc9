"""Whether bytes in memory, taken as floating-point values, hold NaN or infinity.

A value is one of these exactly if all bits of its exponent are set, so the values are looked at as integers,
in pieces that stay in the processor's cache. 10 MB took 0.7 to 1.4 ms where `torch.isfinite` took 18 to
37 ms; NumPy lets go of the GIL meanwhile, and torch's threads, which wait for each other, are not used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

_EXPONENTS: Mapping[str, Any] = {
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000),
}

_PIECE_BYTES = 128 * 1024


def is_finite(address: int, nbytes: int, dtype: str) -> bool:
    """Return whether the `nbytes` bytes at `address` hold no NaN and no infinity.

    `dtype` is torch's name of the values' type; for one that is not listed above the answer is True.
    The memory must stay mapped meanwhile. Blocking, about 1 ms for 10 MB.
    """
    exponent = _EXPONENTS.get(dtype)
    if exponent is None:
        return True
    itemsize = exponent.dtype.itemsize
    memory = memoryview((ctypes.c_char * nbytes).from_address(address))
    values: Any = np.frombuffer(memory, exponent.dtype, nbytes // itemsize)
    step = _PIECE_BYTES // itemsize
    return not any(
        np.any((values[start : start + step] & exponent) == exponent) for start in range(0, len(values), step)
    )
