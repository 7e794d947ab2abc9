"""The supervisor: disturbs workers at random, repairs them, and times how soon each serves again.

One thread, stepped by `step`: it starts the processes, which the kernel ends with the thread that did.
"""

from __future__ import annotations

import random
import signal
import sys
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.chaos.stack import ChaosStack
from tests.services import Service

SERVED = {"PD": "trtllm_mm_cache_requests_total", "encode": "trtllm_mm_cache_embeddings_total"}
"""What rises when a worker serves."""
_LONGEST_FREEZE_S = 4.0
_LONGEST_ABSENCE_S = 1.0
_PROBE_EVERY_S = 0.2


class Fault(Enum):
    """What is done to a worker."""

    KILL = "kill -9, restart"
    FREEZE = "SIGSTOP, SIGCONT"
    RESTART = "SIGTERM, restart"


class State(Enum):
    """Where a worker stands; `REPAIRED` is one that could serve again but has not been seen to yet."""

    SERVING = "serving"
    OUT = "out"
    STARTING = "starting"
    REPAIRED = "repaired"


@dataclass
class Victim:
    """One worker and what happens to it now."""

    kind: str
    service: Service
    state: State = State.SERVING
    fault: Fault = Fault.KILL
    repair_at: float = 0.0
    repaired_at: float = 0.0
    served_before: float = 0.0
    probe_at: float = 0.0

    def served(self) -> float:
        """How much it has served since its start. Raises `OSError` when it does not answer."""
        labels = {"outcome": "served"} if self.kind == "PD" else {}
        return self.service.process.metric(SERVED[self.kind], **labels)


@dataclass
class Record:
    """What was done, by kind of worker and fault, and the seconds from each repair to the first service."""

    faults: Counter[tuple[str, Fault]] = field(default_factory=Counter)
    recoveries: dict[tuple[str, Fault], list[float]] = field(default_factory=dict)
    aborts: Counter[str] = field(default_factory=Counter)


class Supervisor:
    """At most one PD worker is out at a time, encode workers in any number, also all of them.

    `probe` is called with a kind of worker while a repaired one has not served yet: it needs work to do.
    """

    def __init__(
        self, stack: ChaosStack, rng: random.Random, probe: Callable[[str], None], pause_s: float
    ) -> None:
        self.record = Record()
        self._rng = rng
        self._probe = probe
        self._pause_s = pause_s
        self._victims = [Victim("PD", service) for service in stack.pd_workers]
        self._victims += [Victim("encode", service) for service in stack.encode_workers]
        self._began = self._next_fault_at = time.monotonic()

    @property
    def all_serve(self) -> bool:
        """Whether every worker is as it should be."""
        return all(victim.state is State.SERVING for victim in self._victims)

    def step(self, *, disturb: bool) -> None:
        """Do what is due; with `disturb` also something new."""
        now = time.monotonic()
        for victim in self._victims:
            self._look_after(victim, now)
        if disturb and now >= self._next_fault_at:
            self._disturb(now)
            self._next_fault_at = now + self._rng.uniform(0.5, 1.5) * self._pause_s

    def _say(self, victim: Victim, what: str) -> None:
        print(
            f"{time.monotonic() - self._began:7.2f} s  {victim.service.name}: {what}",
            file=sys.stderr,
            flush=True,
        )

    def _look_after(self, victim: Victim, now: float) -> None:
        service = victim.service
        if victim.state in (State.SERVING, State.STARTING, State.REPAIRED) and not service.alive:
            # Nobody asked it to end: UCX was seen to abort an exporter whose reader was killed in a READ.
            self.record.aborts[f"{victim.kind} worker, status {service.popen.returncode}"] += 1
            victim.state, victim.repair_at, victim.fault = State.OUT, now, Fault.KILL
            self._say(victim, f"ended unasked with status {service.popen.returncode}")
        elif victim.state is State.OUT and now >= victim.repair_at:
            self._repair(victim)
        elif victim.state is State.STARTING and service.is_ready:
            victim.state, victim.repaired_at, victim.served_before = State.REPAIRED, now, 0.0
        elif victim.state is State.REPAIRED:
            self._look_for_recovery(victim, now)

    def _disturb(self, now: float) -> None:
        pd_is_out = any(victim.kind == "PD" and victim.state is not State.SERVING for victim in self._victims)
        candidates = [
            victim
            for victim in self._victims
            if victim.state is State.SERVING and not (victim.kind == "PD" and pd_is_out)
        ]
        if not candidates:
            return
        victim, fault = self._rng.choice(candidates), self._rng.choice(list(Fault))
        number = {Fault.KILL: signal.SIGKILL, Fault.FREEZE: signal.SIGSTOP, Fault.RESTART: signal.SIGTERM}
        longest = _LONGEST_FREEZE_S if fault is Fault.FREEZE else _LONGEST_ABSENCE_S
        victim.state, victim.fault = State.OUT, fault
        victim.repair_at = now + self._rng.uniform(0.1, longest)
        victim.service.signal(number[fault])
        self.record.faults[victim.kind, fault] += 1
        self._say(victim, fault.value)

    def _repair(self, victim: Victim) -> None:
        if victim.fault is Fault.FREEZE:
            victim.service.signal(signal.SIGCONT)
            victim.state, victim.repaired_at = State.REPAIRED, time.monotonic()
            victim.served_before = victim.served()
        elif not victim.service.alive:  # one that drains may take its time
            victim.service.start()
            victim.state = State.STARTING

    def _look_for_recovery(self, victim: Victim, now: float) -> None:
        if now >= victim.probe_at:
            self._probe(victim.kind)
            victim.probe_at = now + _PROBE_EVERY_S
        try:
            served = victim.served()
        except (urllib.error.URLError, OSError):
            return
        if served > victim.served_before:
            took = time.monotonic() - victim.repaired_at
            self.record.recoveries.setdefault((victim.kind, victim.fault), []).append(took)
            victim.state = State.SERVING
            self._say(victim, f"serves again, {took:.2f} s after its repair")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed."""
    return sorted(values)[max(0, round(share * len(values)) - 1)]
