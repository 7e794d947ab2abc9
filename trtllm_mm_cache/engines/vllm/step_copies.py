"""What the two sides of the connector tell each other; vLLM carries it between its processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata, ECConnectorWorkerMetadata

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.own_tower import Fill


@dataclass
class StepCopies(ECConnectorMetadata):  # type: ignore[misc]
    """What the workers load before a step and copy out within it, by identifier.

    `fills` are of what the tower makes in this step, `kept` of what vLLM's encoder cache has already.
    """

    loads: list[tuple[str, Handle]] = field(default_factory=list)
    fills: dict[str, Fill] = field(default_factory=dict)
    kept: dict[str, Fill] = field(default_factory=dict)


@dataclass(frozen=True)
class FailedLoads(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """Identifiers of embeddings that a worker could not load."""

    identifiers: frozenset[str]

    def aggregate(self, other: FailedLoads) -> FailedLoads:
        """Return the failures of both: one rank's is everybody's."""
        return FailedLoads(self.identifiers | other.identifiers)
