"""How the ranks of a tensor-parallel worker meet.

MPI is used to meet and no longer: a rank that waits in MPI polls a core, and a process that has left MPI
may end as any other, mpirun watching its exit status. What stays afterwards:

- one local socket between rank 0 and each other rank. Waiting on it costs nothing, and a rank that dies,
  however it dies, is an end-of-file on the other side;
- torch's process group over gloo, which the library's tensor-parallel layers use for their sums. It finds
  its peers through a file and listens on loopback alone.

All ranks must be on one node: they map the same arena.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from trtllm_mm_cache.engines.ranks import Place
from trtllm_mm_cache.errors import ConfigurationError

COLLECTIVE_DEADLINE_S = 120.0
"""Longest time that one rank may be behind another inside a forward pass."""

_MEETING_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Invitation:
    """What rank 0 tells the others when they meet. `folder` holds the socket and gloo's file."""

    model_path: str
    folder: str


@dataclass(frozen=True)
class Meeting:
    """`connections` by rank. `folder` is to be removed when every rank has loaded the model, not before."""

    connections: Mapping[int, Connection]
    folder: Path

    def remove_folder(self) -> None:
        """Remove the socket's and gloo's files. Idempotent."""
        shutil.rmtree(self.folder, ignore_errors=True)


def meet_followers(place: Place, model_path: Path) -> Meeting:
    """On rank 0: wait for the other ranks. Blocking.

    The process group exists afterwards. Raises `ConfigurationError` when the ranks cannot work together.
    """
    _check_devices(place)
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))  # mode 0700: no other user's process can connect
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            _listen(listener, folder, place)
            _exchange(place, Invitation(str(model_path), str(folder)))
            connections = dict(_accept(listener) for _ in range(1, place.size))
        _join_group(place, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Meeting(connections, folder)


def meet_leader(place: Place) -> tuple[Connection, Path]:
    """On any other rank: return the connection to rank 0 and the model's directory. Blocking.

    The process group exists afterwards. Raises `ConfigurationError` as `meet_followers` does there.
    """
    _check_devices(place)
    invitation = _exchange(place, None)
    with socket.socket(socket.AF_UNIX) as joined:
        joined.settimeout(_MEETING_DEADLINE_S)
        joined.connect(str(Path(invitation.folder) / "leader"))
        joined.settimeout(None)
        connection = Connection(joined.detach())
    connection.send(place.rank)
    _join_group(place, Path(invitation.folder))
    return connection, Path(invitation.model_path)


def _listen(listener: socket.socket, folder: Path, place: Place) -> None:
    try:
        listener.bind(str(folder / "leader"))
    except OSError as error:
        raise ConfigurationError(
            f"the ranks have no place to meet ({error}); set TMPDIR to a folder with a short name"
        ) from error
    listener.listen(place.size)
    listener.settimeout(_MEETING_DEADLINE_S)


def _accept(listener: socket.socket) -> tuple[int, Connection]:
    accepted, _ = listener.accept()
    accepted.settimeout(None)
    connection = Connection(accepted.detach())
    return connection.recv(), connection


def _check_devices(place: Place) -> None:
    # transformers spreads a model over the accelerators it sees, whatever device was asked for.
    if torch.accelerator.is_available():
        raise ConfigurationError(
            f"the transformers engine computes on the CPU when it has {place.size} ranks, but there are "
            "accelerators: hide them (CUDA_VISIBLE_DEVICES=), use one rank, or use the trtllm engine"
        )


def _exchange(place: Place, invitation: Invitation | None) -> Invitation:
    """Enter MPI, pass rank 0's invitation to every rank, compare the nodes, leave MPI."""
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "several ranks need mpi4py, which is not installed: pip install 'trtllm-mm-cache[mpi]'"
        ) from error
    mpi4py.rc(initialize=False, finalize=False)
    from mpi4py import MPI

    MPI.Init_thread(MPI.THREAD_FUNNELED)
    world = MPI.COMM_WORLD
    size = world.size
    nodes = sorted(set(world.allgather(socket.gethostname())))
    received: Invitation | None = world.bcast(invitation, root=0)
    MPI.Finalize()
    if size != place.size or received is None:
        raise ConfigurationError(
            f"mpirun started {place.size} ranks, but MPI sees {size}: mpirun and mpi4py belong to different "
            "MPI installations; install both with: pip install 'trtllm-mm-cache[mpi]'"
        )
    if len(nodes) > 1:
        raise ConfigurationError(
            f"the ranks are on the nodes {', '.join(nodes)}, but the transformers engine's ranks share one "
            "node's memory: start them on one node, or use the trtllm engine, which spans nodes"
        )
    return received


def _join_group(place: Place, folder: Path) -> None:
    """Create torch's process group; returns when every rank is in it and connected to the others."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=(folder / "gloo").as_uri(),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=COLLECTIVE_DEADLINE_S),
    )
