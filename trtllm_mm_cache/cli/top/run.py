"""`trtllm-mm-cache top`: scrape, compute, draw, again."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live

from trtllm_mm_cache.cli.top.figures import cache_figures, encode_worker_figures
from trtllm_mm_cache.cli.top.scrape import OURS, Interval, Scrape
from trtllm_mm_cache.cli.top.sources import Source, make_source
from trtllm_mm_cache.cli.top.view import Frame, draw
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.runtime.control_client import no_worker_found
from trtllm_mm_cache.settings import TopSettings

_PLAIN_WIDTH = 160


def run_top(settings: TopSettings) -> None:
    """Show the workers until Ctrl-C, or `settings.count` times; raises `MmCacheError` when none is found."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH, color_system=None)
    try:
        asyncio.run(_run(settings, console))
    except KeyboardInterrupt:
        sys.exit(130)


async def _run(settings: TopSettings, console: Console) -> None:
    source = make_source(settings)
    history = History(window_s=settings.window_s)
    count = settings.count or (None if console.is_terminal else 1)
    try:
        await history.add(source)
        if not history.found:
            raise no_worker_found(settings)
        if count is None:
            await _live(settings, console, source, history)
        for _ in range(count or 0):
            await asyncio.sleep(settings.interval_s)
            await history.add(source)
            console.print(draw(history.frame(), plain=not console.is_terminal))
    finally:
        await source.close()


async def _live(settings: TopSettings, console: Console, source: Source, history: History) -> None:
    with Live(draw(history.frame(), plain=False), console=console, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(settings.interval_s)
            await history.add(source)
            live.update(draw(history.frame(), plain=False), refresh=True)


class History:
    """The scrapes of the last `window_s` seconds."""

    def __init__(self, *, window_s: float) -> None:
        self._window_s = window_s
        self._rounds: deque[Mapping[str, Scrape]] = deque()
        self._away: dict[str, str] = {}

    @property
    def found(self) -> bool:
        """Whether anything is known of any worker, be it that it is away."""
        return bool(self._away) or any(self._rounds)

    async def add(self, source: Source) -> None:
        """Scrape once more, and forget what is older than the window."""
        texts, at = await source.read(), time.monotonic()
        scrapes, self._away = {}, {}
        for name, text in texts.items():
            if isinstance(text, MmCacheError):
                self._away[name] = str(text)
                continue
            try:
                scrape = Scrape.parse(text, at)
            except ValueError:
                self._away[name] = "what it serves are no Prometheus metrics"
                continue
            if scrape.component:
                scrapes[name] = scrape
            else:
                self._away[name] = "it serves no metrics of a PD or encode worker"
        for name in self._rounds[-1] if self._rounds else ():
            if name not in scrapes:
                self._away.setdefault(name, "gone from discovery")
        self._rounds.append(scrapes)
        while len(self._rounds) > 2 and at - self._oldest(1) >= self._window_s:
            self._rounds.popleft()

    def frame(self) -> Frame:
        """Compute what to show now."""
        intervals = {name: self._span(name, scrape) for name, scrape in self._rounds[-1].items()}
        pd = [interval for interval in intervals.values() if interval.now.component == "pd"]
        encode_workers = {
            name: interval for name, interval in intervals.items() if interval.now.component == "encode"
        }
        return Frame(
            window_s=max((interval.seconds for interval in intervals.values()), default=0.0),
            pd_workers=len(pd),
            cache=cache_figures(pd) if pd else None,
            encode_workers=[
                encode_worker_figures(name, interval) for name, interval in sorted(encode_workers.items())
            ],
            breakers=_breakers([interval.now for interval in pd], list(encode_workers)),
            away=dict(self._away),
        )

    def _span(self, name: str, now: Scrape) -> Interval:
        before = next((each[name] for each in self._rounds if name in each), now)
        return Interval(now, None if before is now else before)

    def _oldest(self, index: int) -> float:
        return min((scrape.at for scrape in self._rounds[index].values()), default=0.0)


def _breakers(pd: list[Scrape], encode_workers: list[str]) -> dict[str, str]:
    """Return the encode workers that a PD worker passes over, by name, with their breaker's state."""
    states: dict[str, str] = {}
    for scrape in pd:
        for name, labels, value in scrape.samples:
            if name != f"{OURS}_encode_worker_breaker" or not value or labels["state"] == "closed":
                continue
            worker = next((each for each in encode_workers if each.endswith(f" {labels['instance']}")), None)
            if worker is not None:
                states[worker] = f"breaker {labels['state']}"
    return states
