"""Which entries to drop: one key, everything under one tag, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Dropped(NamedTuple):
    """What a drop made invisible."""

    keys: tuple[str, ...]
    nbytes: int

    @property
    def entries(self) -> int:
        """How many entries."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects the entries of one `key`, or those with one `tag`, or, with neither, all."""

    key: str | None = None
    tag: bytes | None = None

    def matches(self, key: str, tag: bytes | None) -> bool:
        """Whether an entry with this key and tag is selected."""
        if self.key is not None:
            return key == self.key
        return self.tag is None or tag == self.tag
