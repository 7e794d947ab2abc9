"""Page-locking: what lets CUDA copy from and to a mapping at full speed, and without waiting.

It holds for the mapping of the process that asks for it, so whoever copies asks: an encode worker, whose
tower's output goes into its arena; a PD worker whose engine computes in its own process; an engine's own
processes for theirs. Elsewhere it would bring nothing and cost a CUDA context.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import torch

logger = logging.getLogger(__name__)


def page_lock(address: int, nbytes: int) -> bool:
    """Register memory with CUDA, where there is CUDA; return whether it is. Blocking: 0.1 s a GiB and more.

    A refusal costs speed, nothing else: the log has it.
    """
    if not torch.cuda.is_available():
        return False
    status = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)  # type: ignore[no-untyped-call]
    if int(status) != 0:
        logger.warning(
            "CUDA did not page-lock the arena (error %d): copies to and from the device are slower",
            int(status),
        )
        _take_refusal()
        return False
    return True


def _take_refusal() -> None:
    """Have torch raise the refusal here, which the next kernel of this thread would raise as its own.

    CUDA keeps it as the thread's last error, and torch binds nothing else that takes it.
    """
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def page_unlock(address: int) -> None:
    """End what `page_lock` began, before the memory is unmapped."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
