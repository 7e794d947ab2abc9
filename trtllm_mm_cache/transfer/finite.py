"""One pass over an embedding's bytes: copied if need be, hashed, looked at for NaN and infinity.

A value is one of these exactly if all bits of its exponent are set. Taken as integers, with the sign as their
highest bit, the positive ones of these are the largest signed numbers and the negative ones the largest
unsigned numbers, so two maxima tell, without a temporary. They are looked for in pieces that stay in the
processor's cache, together with the checksum: every byte comes from memory once. 34 MB that lay in no cache
took 3.4 ms, of which the checksum alone 2.4 ms; `torch.isfinite` took 18 to 37 ms for 10 MB. NumPy and xxhash
release the GIL meanwhile, and torch's threads, which wait for each other, are not used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

# The signed and the unsigned integers of a type's width, and where its infinity lies among the signed ones.
_INTEGERS: Mapping[str, tuple[Any, Any, int]] = {
    "float16": (np.int16, np.uint16, 0x7C00),
    "bfloat16": (np.int16, np.uint16, 0x7F80),
    "float32": (np.int32, np.uint32, 0x7F800000),
    "float64": (np.int64, np.uint64, 0x7FF0000000000000),
}

PIECE_BYTES = 512 * 1024
"""What stays in the processor's cache between two checks of the same bytes."""

# Called through CDLL, it runs without the GIL.
_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = ctypes.c_void_p


class Pass:
    """One pass over the `nbytes` bytes at `address`, in order, in as many steps as they arrive in.

    `dtype` is torch's name of the values' type; steps end where a value ends. `checked` counts bytes; in the
    end `checksum` is XXH3-64 over all and `finite` says whether they hold no NaN and no infinity, which is
    True for a dtype of None or one that is not listed above. The memory must stay mapped meanwhile.
    """

    def __init__(self, address: int, nbytes: int, dtype: str | None) -> None:
        self._address = address
        self._dtype = dtype
        self._memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        self._digest = xxhash.xxh3_64()
        self.checked = 0
        self.finite = True

    @property
    def checksum(self) -> int:
        """XXH3-64 over what is checked."""
        return self._digest.intdigest()

    def advance(self, nbytes: int, *, source: int | None = None) -> None:
        """Check the next `nbytes` bytes. Blocking, about 0.1 ms for 1 MB.

        With a `source` they are copied from that address first, and judged as they arrived.
        """
        end = self.checked + nbytes
        while self.checked < end:
            piece = self._memory[self.checked : min(end, self.checked + PIECE_BYTES)]
            if source is not None:
                _memmove(self._address + self.checked, source, len(piece))
                source += len(piece)
            self._digest.update(piece)
            self.finite &= is_finite(piece, self._dtype)
            self.checked += len(piece)


def checksum_and_finite(
    address: int, nbytes: int, dtype: str | None, *, source: int | None = None
) -> tuple[int, bool]:
    """Return what a `Pass` over the whole in one step finds: the checksum, and whether all is finite."""
    whole = Pass(address, nbytes, dtype)
    whole.advance(nbytes, source=source)
    return whole.checksum, whole.finite


def is_finite(piece: memoryview, dtype: str | None) -> bool:
    """Whether a piece of values of torch's `dtype` holds no NaN and no infinity; as above for others."""
    integers = _INTEGERS.get(dtype or "")
    return integers is None or _is_finite(piece, *integers)


def _is_finite(piece: memoryview, signed: Any, unsigned: Any, infinity: int) -> bool:
    values = np.frombuffer(piece, signed, len(piece) // np.dtype(signed).itemsize)
    if len(values) == 0:
        return True
    minus_infinity = infinity + (1 << 8 * values.itemsize - 1)
    return bool(values.max() < infinity and values.view(unsigned).max() < minus_infinity)
