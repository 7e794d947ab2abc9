"""What the processes of a run hold of memory, over all their starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.services import Service

MB = 1024**2


@dataclass
class Memory:
    """The anonymous memory of each process: when it began to be looked at, and the most since, in bytes."""

    services: Sequence[Service]
    first: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        """Look at what runs now."""
        for service in self.services:
            nbytes = service.anonymous_bytes
            self.first.setdefault(service.name, nbytes)
            self.most[service.name] = max(nbytes, self.most.get(service.name, 0))

    def rows(self) -> list[tuple[str, str]]:
        """Return a row of the report's table for each process."""
        return [
            (
                f"anonymous memory of {name}",
                f"{self.first[name] / MB:.0f} MB at first, at most {most / MB:.0f}",
            )
            for name, most in self.most.items()
        ]
