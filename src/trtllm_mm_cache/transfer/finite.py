"""Whether bytes in memory, taken as floating-point values, hold NaN or infinity.

A value is one of these exactly if all bits of its exponent are set, so the values are looked at as integers,
in pieces that stay in the processor's cache, together with the checksum: every byte comes from memory once.
34 MB took 2.4 ms where a checksum and then this check over the whole took 5.6 ms, and 10 MB 0.7 ms where
`torch.isfinite` alone took 18 to 37 ms. NumPy and xxhash let go of the GIL meanwhile, and torch's threads,
which wait for each other, are not used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

_EXPONENTS: Mapping[str, Any] = {
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000),
}

_PIECE_BYTES = 512 * 1024


def checksum_and_finite(address: int, nbytes: int, dtype: str | None) -> tuple[int, bool]:
    """Return XXH3-64 over the `nbytes` bytes at `address`, and whether they hold no NaN and no infinity.

    `dtype` is torch's name of the values' type; for None and for one that is not listed above the second
    is True. The memory must stay mapped meanwhile. Blocking, about 0.7 ms for 10 MB.
    """
    memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
    digest = xxhash.xxh3_64()
    exponent = _EXPONENTS.get(dtype or "")
    scratch = None if exponent is None else np.empty(_PIECE_BYTES // exponent.dtype.itemsize, exponent.dtype)
    finite = True
    for start in range(0, nbytes, _PIECE_BYTES):
        piece = memory[start : start + _PIECE_BYTES]
        digest.update(piece)
        if scratch is not None:
            finite &= _is_finite(piece, exponent, scratch)
    return digest.intdigest(), finite


def _is_finite(piece: memoryview, exponent: Any, scratch: Any) -> bool:
    values = np.frombuffer(piece, exponent.dtype, len(piece) // exponent.dtype.itemsize)
    masked = np.bitwise_and(values, exponent, out=scratch[: len(values)])
    return bool(len(masked) == 0 or masked.max() != exponent)
