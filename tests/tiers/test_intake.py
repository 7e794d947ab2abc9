"""What a tier announces, before room is made for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.tiers.bench import METADATA, NBYTES, ROWS, WIDTH, Bench, item_of
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import Reservation
from trtllm_mm_cache.errors import EmbeddingMismatchError


@dataclass
class Announced:
    """`Found` whose bytes nobody asks for."""

    nbytes: int = NBYTES
    dtype: str = "float32"
    shape: tuple[int, int] = (ROWS, WIDTH)
    metadata: EmbeddingMetadata = METADATA
    content: bytes | None = None
    released: bool = False

    async def read_into(self, reservation: Reservation, *, finite: bool) -> None:
        raise AssertionError(f"room was made: {reservation}, {finite}")

    def release(self) -> None:
        self.released = True


@pytest.mark.parametrize("tier_kind", ["disk"])
@pytest.mark.parametrize(
    "changed",
    [
        {"nbytes": NBYTES - 4},
        {"shape": (ROWS, WIDTH + 1)},
        {"dtype": "float16"},
        {"dtype": "float33"},
        {"dtype": "nn"},
    ],
)
async def test_no_room_is_made_for_a_size_that_is_not_its_shapes(
    bench: Bench, changed: dict[str, Any]
) -> None:
    found = Announced(**changed)
    with pytest.raises(EmbeddingMismatchError, match="announced"):
        await bench.receiver.receive(item_of(1), found)
    assert found.released
