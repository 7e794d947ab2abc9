"""What a chaos run came to: the table, and what was not as promised."""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.load import Outcomes
from tests.chaos.memory import Memory
from tests.chaos.supervisor import Record
from tests.services import Service

ALLOWED_FAILURES = frozenset({"HTTP 503", "HTTP 200, then an error event with code pd_lost"})
"""What docs/failure-modes.md says a client may see while workers die, freeze and restart."""
HELD = tuple(
    f"trtllm_mm_cache_{name}"
    for name in (
        "leased_bytes",
        "withdrawn_bytes",
        "reserved_bytes",
        "quarantined_bytes",
        "arena_unaccounted_bytes",
        "forgotten_reservations_total",
        "exports_held",
        "reads_in_flight",
        "requests_in_flight",
        "flights_in_progress",
        "tier_waiting_offers",
        "tier_stuck_threads",
    )
)
"""Gauges of a worker's system port that must be 0 when nothing is asked of it."""
_SETTLE_S = 15.0


def left_over(workers: Sequence[Service]) -> dict[str, dict[str, float]]:
    """Wait for idle workers to hold nothing; return what they hold at the end, by worker and gauge."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        held = {worker.name: _held(worker) for worker in workers if worker.alive}
        left = {name: gauges for name, gauges in held.items() if gauges}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


IN_ORDER = "in order"


def end(workers: Sequence[Service]) -> dict[str, str]:
    """Stop workers as a supervisor does; say of each `IN_ORDER`, or what was not."""
    for worker in workers:
        worker.signal(signal.SIGTERM)
    return {worker.name: _ending(worker) for worker in workers}


def _ending(worker: Service) -> str:
    status = worker.ended()
    if status:
        return f"ended with status {status}"
    lines = [line for line in worker.log.read_text().splitlines() if ": closed, accounting" in line]
    agree = [line for line in lines if line.endswith("leased 0, reserved 0, quarantined 0")]
    return IN_ORDER if lines and lines == agree else f"its log says at the end: {lines}"


def _held(worker: Service) -> dict[str, float]:
    values = {name: worker.process.metric(name) for name in HELD}
    return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Report:
    """The whole run. `left_over` holds gauges other than 0 at the end, `endings` what `end` said."""

    seed: int
    seconds: float
    outcomes: Outcomes
    record: Record
    everything_serves: bool
    left_over: dict[str, dict[str, float]]
    endings: dict[str, str]
    memory: Memory
    tier_faults: Counter[str] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        """Say what was not as promised; empty if all was."""
        found = [f"wrong answer: {wrong}" for wrong in self.outcomes.wrong]
        found += [
            f"{count} requests failed with {failure}, which is not documented"
            for failure, count in self.outcomes.failures.items()
            if failure not in ALLOWED_FAILURES
        ]
        found += [f"{name} still holds {held}" for name, held in self.left_over.items()]
        found += [f"{name}: {said}" for name, said in self.endings.items() if said != IN_ORDER]
        if not self.everything_serves:
            found.append("a repaired worker did not serve again")
        if not self.outcomes.right:
            found.append("not one request was answered")
        return found

    def table(self) -> str:
        """Return the report as a Markdown table."""
        outcomes = self.outcomes
        rows = [
            ("seed", str(self.seed)),
            ("seconds", f"{self.seconds:.0f}"),
            ("requests", str(outcomes.requests)),
            ("answered right", str(outcomes.right)),
            ("answered wrong", str(len(outcomes.wrong))),
            *((f"failed: {failure}", str(count)) for failure, count in sorted(outcomes.failures.items())),
            ("slowest request", f"{outcomes.slowest_s:.1f} s"),
        ]
        for (kind, fault), count in sorted(self.record.faults.items(), key=str):
            times = self.record.recoveries.get((kind, fault), [])
            said = "none"
            if times:
                said = f"served again after {statistics.median(times):.2f} s, at most {max(times):.2f} s"
            rows.append((f"{kind} worker: {fault.value}", f"{count} times; {said}"))
        rows += [(fault, f"{count} times") for fault, count in sorted(self.tier_faults.items())]
        rows += [(f"ended unasked: {who}", str(count)) for who, count in sorted(self.record.aborts.items())]
        rows += self.memory.rows()
        rows.append(("leases, extents, exports, READs, requests left", str(self.left_over or 0)))
        agree = sum(said == IN_ORDER for said in self.endings.values())
        rows.append(("workers whose accounting was consistent at the end", f"{agree} of {len(self.endings)}"))
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
