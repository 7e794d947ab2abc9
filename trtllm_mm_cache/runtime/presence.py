"""Keeps a worker on discovery's list of those that serve.

A process that stands still for longer than its entry lives (10 s: stopped, suspended, starved) is taken off
the list. With files Dynamo 1.6.1 notices that its entry has gone, says so every few seconds, and never makes
another: the worker would get no request until it is restarted. So it looks for itself, and registers again.
With etcd Dynamo ends the runtime of a worker that cannot renew its lease: the process ends, with an error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from dynamo.runtime import Endpoint

from trtllm_mm_cache.errors import DiscoveryLostError

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
# A worker that stood still before the first look that found it would otherwise wait for that look for ever.
_LOOKS_TO_REGISTER = 100


async def serve_present(
    endpoint: Endpoint,
    handler: Any,
    draining: asyncio.Event,
    *,
    register: Callable[[], Awaitable[None]] | None = None,
    metrics_labels: list[tuple[str, str]] | None = None,
) -> None:
    """Serve `endpoint` until its runtime is shut down, and keep it on the list until `draining`.

    `register` puts it back there; the endpoint's own registration, if none is given. Raises
    `DiscoveryLostError` when the runtime ends without `draining`.
    """
    register = register or endpoint.register_endpoint_instance
    presence = asyncio.create_task(_keep_present(endpoint, register, draining), name="presence")
    try:
        await endpoint.serve_endpoint(handler, metrics_labels=metrics_labels)
    finally:
        presence.cancel()
    if not draining.is_set():
        raise DiscoveryLostError(
            "this worker is out of discovery: its lease could not be renewed in time, because etcd was down "
            "or out of reach; restart the process, and set ETCD_LEASE_TTL (seconds) above such outages"
        )


async def _keep_present(
    endpoint: Endpoint, register: Callable[[], Awaitable[None]], draining: asyncio.Event
) -> None:
    """Call `register` whenever `endpoint` was on the list and is not any more, until `draining`.

    Also when it has not come onto the list within 10 s of looking.

    A registration that fails is logged and tried again at the next look.
    """
    client = await endpoint.client()
    me, was_there, looks, failures = endpoint.connection_id(), False, 0, 0
    while not draining.is_set():
        if me in client.instance_ids():
            was_there, failures = True, 0
        elif was_there or looks >= _LOOKS_TO_REGISTER:
            logger.warning("discovery has lost this worker, which must have stood still: registering again")
            try:
                await register()
            except Exception:
                failures += 1
                if failures.bit_count() == 1:  # not ten times a second
                    logger.exception("this worker could not register again (%d times so far)", failures)
        looks += 1
        try:
            async with asyncio.timeout(_LOOK_S):
                await draining.wait()
        except TimeoutError:
            continue
