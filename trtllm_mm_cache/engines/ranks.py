"""Which rank of an mpirun job this process is: read from the environment, nothing is imported or started."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Open MPI's (and PRRTE's) names, then those of MPICH's and Intel's launchers.
_VARIABLES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


@dataclass(frozen=True)
class Place:
    """`rank` of `size` ranks; rank 0 leads."""

    rank: int
    size: int


def place_in_job() -> Place:
    """Return this process's place; rank 0 of 1 where no mpirun started it."""
    for rank, size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            return Place(int(os.environ[rank]), int(os.environ[size]))
    return Place(0, 1)
