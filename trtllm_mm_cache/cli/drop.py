"""`trtllm-mm-cache drop`: drops embeddings on every worker that discovery knows.

Four rounds: encode workers, PD workers, and both again. The first makes sure that a PD worker that has
dropped cannot be given the old bytes once more. The second ends when what was on its way to the PD workers
has ended, and the third takes what that left in the encode workers' arenas.

Each worker drops its arena and then its tiers, of which some are shared: a store, a folder. From its first
round to its last a worker retains nothing of what is dropped, and so offers none of it to a tier and keeps
none that a tier still brings. When the last round begins all have dropped once and none holds any of it: what
a worker removes from a tier now stays removed.
"""

from __future__ import annotations

import asyncio
import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from trtllm_mm_cache.cache.key import content_digest
from trtllm_mm_cache.cache.scope import Scope, salt_tag
from trtllm_mm_cache.errors import ConfigurationError, MmCacheError
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.observability.logs import configure_logging, say
from trtllm_mm_cache.runtime.connect import connect
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.control_client import ControlClient, Worker, no_worker_found
from trtllm_mm_cache.runtime.messages import MAX_MEDIA_BYTES
from trtllm_mm_cache.settings import MB, DropSettings, ImageLimits, MediaSettings

_CALL_S = 10.0
_ROUNDS = 4


def run_drop(settings: DropSettings) -> None:
    """Drop what `settings` says and print what each worker dropped.

    Raises `ConfigurationError` when it does not say what to drop, `MmCacheError` when no worker was found or
    one did not do it; the others have then done it all the same.
    """
    configure_logging("WARNING", streams=(2,))
    if (settings.image is not None) + (settings.key is not None) + settings.salt + settings.all != 1:
        raise ConfigurationError("say what to drop: --image FILE or URL, --key HEX, --salt or --all")
    asyncio.run(_drop(settings, _request(settings)))


def _request(settings: DropSettings) -> DropRequest:
    if settings.image is not None:
        return DropRequest(content=_content(settings.image), deadline_s=settings.wait_s)
    if settings.salt:
        return DropRequest(tag=salt_tag(_read_salt()).hex(), deadline_s=settings.wait_s)
    return DropRequest(key=settings.key, everything=settings.all, deadline_s=settings.wait_s)


def _content(image: str) -> str:
    """Return the digest, in hex, of a file's bytes or of those that a URL leads to now."""
    try:
        if image.lower().startswith(("http://", "https://", "data:")):
            media = asyncio.run(_fetch(image))
        else:
            media = Path(image).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"--image cannot be read: {error.strerror}") from error
    digest = content_digest(media).hex()
    print(f"the image has {len(media)} bytes, BLAKE3 {digest}")
    return digest


async def _fetch(url: str) -> bytes:
    """Fetch as a PD worker would; an operator's URL may lead to this network."""
    limits = ImageLimits(max_file_size_mb=MAX_MEDIA_BYTES / MB)
    async with MediaSource(MediaSettings(allow_private_addresses=True), limits) as source:
        return await source.fetch(url, Scope(retain=False))


def _read_salt() -> str:
    """Read the salt from where neither the list of processes nor the shell's history shows it."""
    salt = getpass.getpass("cache_salt: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if not salt:
        raise ConfigurationError("--salt reads the cache_salt from standard input, and there was none")
    return salt


async def _drop(settings: DropSettings, request: DropRequest) -> None:
    runtime, members = connect(settings)
    try:
        encode = await ControlClient.connect(runtime, "encode", settings.encode_endpoint, members)
        pd = await ControlClient.connect(runtime, "PD", settings.endpoint, members)
        encode_workers, pd_workers = await asyncio.gather(
            encode.workers(wait_s=settings.discovery_wait_s), pd.workers(wait_s=settings.discovery_wait_s)
        )
        if not encode_workers and not pd_workers:
            raise no_worker_found(settings)
        barring = request.model_copy(update={"bar_s": _ROUNDS * (2 * request.deadline_s + _CALL_S)})
        rounds = [
            (encode, encode_workers, barring),
            (pd, pd_workers, barring),
            (encode, encode_workers, request),
            (pd, pd_workers, request),
        ]
        failures = 0
        totals: dict[Worker, DropReport] = {}
        for client, workers, asked in rounds:
            failures += await _round(client, workers, asked, totals)
    finally:
        runtime.shutdown()
    for worker, report in totals.items():
        print(_describe(worker, report))
    if failures:
        raise MmCacheError("not every worker has dropped; the lines above say which have")


async def _round(
    client: ControlClient, workers: Sequence[Worker], request: DropRequest, totals: dict[Worker, DropReport]
) -> int:
    """Ask `workers` at the same time; add to `totals` what they dropped, return how many did not answer."""
    timeout_s = 2 * request.deadline_s + _CALL_S
    answers = await asyncio.gather(
        *(client.call(worker, request, DropReport, timeout_s=timeout_s) for worker in workers),
        return_exceptions=True,
    )
    failures = 0
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, MmCacheError):
            failures += 1
            say(f"{worker}: {answer}")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            totals[worker] = _sum(totals.get(worker), answer)
    return failures


def _sum(before: DropReport | None, report: DropReport) -> DropReport:
    if before is None:
        return report
    return DropReport(
        entries=before.entries + report.entries,
        nbytes=before.nbytes + report.nbytes,
        media=before.media + report.media,
        under_way=report.under_way,
        stored=before.stored + report.stored,
        stored_bytes=before.stored_bytes + report.stored_bytes,
    )


def _describe(worker: Worker, report: DropReport) -> str:
    text = f"{worker}: dropped {report.entries} embeddings of {report.nbytes} bytes"
    if report.stored:
        text += f", {report.stored} on disk or in the store of {report.stored_bytes} bytes"
    if report.media:
        text += f", {report.media} fetched files"
    if report.under_way:
        text += f"; {report.under_way} still on their way, which an encode worker may store: drop again"
    return text
