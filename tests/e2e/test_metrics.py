"""The metrics of real workers: named and labelled as documented, and exact after known traffic."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.deploy.queries import alert_queries, dashboard_queries, unknown
from tests.e2e.stack import REPOSITORY, Process, Stack, new_image, wait_until
from trtllm_mm_cache.errors import error_codes
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.settings import TierSettings
from trtllm_mm_cache.tiers.configured import stored_tiers

QUESTION = "What is this?"
OURS = ("dynamo_component_embedding_cache_", "trtllm_mm_cache_")
COMMON = {"model", "dynamo_component"}
# Dynamo adds these to every sample that a worker exposes.
DYNAMO_LABELS = {"dynamo_namespace", "dynamo_endpoint", "worker_id"}


@dataclass(frozen=True)
class Documented:
    """One row of the table in docs/observability.md."""

    name: str
    kind: str
    labels: frozenset[str]
    component: str


def documented() -> list[Documented]:
    text = (REPOSITORY / "docs/observability.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \|([^|]*)\|[^|]*\| (\w+) \|", text, re.MULTILINE)
    return [
        Documented(name, kind, frozenset(re.findall(r"`(\w+)`", labels)), component)
        for name, kind, labels, component in rows
    ]


def families(process: Process) -> Iterator[tuple[str, Metric]]:
    for family in process.families():
        if family.name.startswith(OURS):
            yield family.name + ("_total" if family.type == "counter" else ""), family


@pytest.fixture(scope="module")
def busy(stack: Stack) -> Stack:
    """The stack after one request of every kind, so that every label has been used."""
    known = new_image()
    for _ in range(2):
        stack.ask(known, QUESTION)
    stack.ask(known, new_image(), QUESTION)
    stack.ask(QUESTION)
    with pytest.raises(openai.APIStatusError):
        stack.ask("data:image/png;base64,AAAA", QUESTION)
    return stack


def frontend_of(stack: Stack) -> Process:
    """Return the frontend, whose metrics are on its HTTP port."""
    (process,) = [each for each in stack.processes if each.name == "frontend"]
    return process


@pytest.mark.parametrize("component", ["pd", "encode", "frontend"])
def test_what_is_exposed_is_what_is_documented(busy: Stack, component: str) -> None:
    workers = busy.workers({"pd": "PD"}.get(component, component))
    (process,) = [frontend_of(busy)] if component == "frontend" else workers
    exposed = dict(families(process))
    of = (component, "all") if component == "frontend" else (component, "both", "all")
    rows = {row.name: row for row in documented() if row.component in of}
    assert exposed.keys() == rows.keys()
    for name, family in exposed.items():
        row = rows[name]
        assert family.type == row.kind, name
        for sample in family.samples:
            assert sample.labels["dynamo_component"] == component
            own = sample.labels.keys() - COMMON - {"le"} - DYNAMO_LABELS
            assert own == row.labels, name


def test_every_error_code_is_there_before_the_first_error(busy: Stack) -> None:
    """What comes up with the value 1 is no increase for Prometheus: rate() and alerts would not see it."""
    for process in [*busy.workers("PD"), *busy.workers("encode")]:
        samples = dict(families(process))["trtllm_mm_cache_errors_total"].samples
        assert {sample.labels["code"] for sample in samples} == set(error_codes())


def test_no_label_holds_anything_of_a_request(busy: Stack) -> None:
    bounded = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
    for process in [frontend_of(busy), *busy.workers("PD"), *busy.workers("encode")]:
        for name, family in families(process):
            values = {value for sample in family.samples for value in sample.labels.values()}
            assert all(bounded.fullmatch(value) for value in values), name
            assert len(family.samples) < 200, name


class Change:
    """What has changed in one worker's metrics since this was made."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._before = self._samples()

    def of(self, name: str, **labels: str) -> float:
        def total(samples: list[Sample]) -> float:
            return sum(
                sample.value
                for sample in samples
                if sample.name == name and labels.items() <= sample.labels.items()
            )

        return total(self._samples()) - total(self._before)

    def comes_to(self, value: float, name: str, **labels: str) -> None:
        """Wait until it is `value`: what is counted after the answer has gone out."""
        wait_until(lambda: self.of(name, **labels) == value, 5, f"{name} did not come to {value}")

    def _samples(self) -> list[Sample]:
        return [sample for family in self._process.families() for sample in family.samples]


def test_hits_misses_and_bytes_are_exact(busy: Stack) -> None:
    (pd,), (encode,) = busy.workers("PD"), busy.workers("encode")
    first, second = new_image(), new_image()
    at_pd, at_encode = Change(pd), Change(encode)
    busy.ask(first, QUESTION)
    nbytes = at_pd.of("dynamo_component_embedding_cache_current_bytes")
    busy.ask(first, QUESTION)
    busy.ask(first, second, QUESTION)
    busy.ask("No picture.")
    assert at_pd.of("dynamo_component_embedding_cache_hits_total") == 2
    assert at_pd.of("dynamo_component_embedding_cache_misses_total") == 2
    assert at_pd.of("dynamo_component_embedding_cache_entries") == 2
    assert nbytes > 0
    assert at_pd.of("trtllm_mm_cache_hit_bytes_total", arena="cache") == 2 * nbytes
    assert at_pd.of("trtllm_mm_cache_served_bytes_total", outcome="hit") == 2 * nbytes
    assert at_pd.of("trtllm_mm_cache_served_bytes_total", outcome="miss") == 2 * nbytes
    assert at_pd.of("trtllm_mm_cache_read_bytes_total") == 2 * nbytes
    assert at_pd.of("trtllm_mm_cache_reads_total", outcome="done") == 2
    kinds = {
        kind: at_pd.of("trtllm_mm_cache_time_to_first_token_seconds_count", kind=kind)
        for kind in ("hit", "miss", "mixed", "text")
    }
    assert kinds == {"hit": 1, "miss": 1, "mixed": 1, "text": 1}
    for step in ("key", "fetch"):
        assert at_pd.of(f"trtllm_mm_cache_{step}_seconds_count") == 4, step
    for step in ("encode_call", "reserve", "transfer", "commit"):
        assert at_pd.of(f"trtllm_mm_cache_{step}_seconds_count") == 2, step
    at_pd.comes_to(4, "trtllm_mm_cache_requests_total", outcome="served")
    assert at_encode.of("trtllm_mm_cache_encodes_total") == 2
    assert at_encode.of("trtllm_mm_cache_encode_seconds_count") == 2
    assert at_encode.of("trtllm_mm_cache_preprocess_seconds_count") == 2
    assert at_encode.of("trtllm_mm_cache_embeddings_total", origin="encoded") == 2
    at_encode.comes_to(2, "trtllm_mm_cache_exports_total", outcome="read")
    # Two hits on an entry save twice what the tower took for it, and both encodes were measured.
    saved, spent = (
        at_pd.of("trtllm_mm_cache_saved_encode_seconds_total"),
        at_encode.of("trtllm_mm_cache_encode_seconds_sum"),
    )
    assert 0 < saved < 2 * spent


def test_of_requests_for_one_new_picture_all_but_the_first_are_coalesced_or_hits(busy: Stack) -> None:
    (pd,), (encode,) = busy.workers("PD"), busy.workers("encode")
    picture = new_image(336, 336)
    at_pd, at_encode = Change(pd), Change(encode)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: busy.ask(picture, QUESTION, max_tokens=1), range(8)))
    joined = at_pd.of("trtllm_mm_cache_flights_joined_total")
    assert at_pd.of("trtllm_mm_cache_flights_total") == 1
    assert joined + at_pd.of("dynamo_component_embedding_cache_hits_total") == 7
    assert at_pd.of("trtllm_mm_cache_lookup_wait_seconds_count", outcome="joined") == joined
    assert at_encode.of("trtllm_mm_cache_encodes_total") == 1


def test_an_error_is_counted_by_its_code(busy: Stack) -> None:
    (pd,) = busy.workers("PD")
    at_pd = Change(pd)
    with pytest.raises(openai.APIStatusError):
        busy.ask("data:image/png;base64,AAAA", QUESTION)
    assert at_pd.of("trtllm_mm_cache_errors_total", code="unsupported_media") == 1
    at_pd.comes_to(1, "trtllm_mm_cache_requests_total", outcome="failed")


def test_the_frontend_counts_answers_by_status_and_their_tokens(busy: Stack) -> None:
    at_frontend = Change(frontend_of(busy))
    answer = busy.client.chat.completions.create(
        model=busy.model, messages=[{"role": "user", "content": QUESTION}], max_tokens=3
    )
    with pytest.raises(openai.NotFoundError):
        busy.client.chat.completions.create(model="other", messages=[{"role": "user", "content": QUESTION}])
    assert answer.usage is not None
    at_frontend.comes_to(1, "trtllm_mm_cache_responses_total", status="200")
    at_frontend.comes_to(1, "trtllm_mm_cache_responses_total", status="404")
    at_frontend.comes_to(answer.usage.completion_tokens, "trtllm_mm_cache_response_tokens_total")
    assert at_frontend.of("trtllm_mm_cache_response_first_token_seconds_count") == 1
    assert frontend_of(busy).metric("trtllm_mm_cache_pd_workers") == 1
    wait_until(
        lambda: frontend_of(busy).metric("trtllm_mm_cache_responses_in_flight") == 0, 5, "something waits"
    )
    assert frontend_of(busy).metric("trtllm_mm_cache_body_bytes") == 0


def test_the_encode_worker_is_seen_and_nothing_is_left_over(busy: Stack) -> None:
    (pd,) = busy.workers("PD")
    assert pd.metric("trtllm_mm_cache_encode_workers") == 1
    assert pd.metric("trtllm_mm_cache_encode_worker_live") == 1
    for process in [pd, *busy.workers("encode")]:
        for name in ("arena_unaccounted_bytes", "reserved_bytes", "quarantined_bytes", "flights_in_progress"):
            assert process.metric(f"trtllm_mm_cache_{name}") == 0, name


@pytest.fixture
async def of_a_tier(tmp_path: Path) -> list[Metric]:
    """What a worker with a disk exposes besides, before anything has happened."""
    registry = CollectorRegistry()
    settings = TierSettings(multimodal_embedding_cache_disk_path=tmp_path / "disk")
    tiers = stored_tiers(settings, "ab" * 32, registry, arenas=[1024])
    (disk,) = tiers._tiers
    while disk._storage.contents().entries is None:
        await asyncio.sleep(0.001)
    text = Exposition(registry, {"dynamo_component": "pd", "model": "m"}).render()
    await tiers.close()
    return list(text_string_to_metric_families(text))


async def test_what_a_tier_exposes_is_what_is_documented(of_a_tier: list[Metric]) -> None:
    rows = {row.name: row for row in documented() if row.component == "tiers"}
    exposed = {family.name + ("_total" if family.type == "counter" else ""): family for family in of_a_tier}
    assert exposed.keys() == rows.keys()
    for name, family in exposed.items():
        assert family.type == rows[name].kind, name
        for sample in family.samples:
            assert sample.labels.keys() - COMMON - {"le"} == rows[name].labels, name


def test_dashboard_and_alerts_ask_for_what_is_exposed(busy: Stack, of_a_tier: list[Metric]) -> None:
    exposed: dict[str, set[str]] = {}
    for family in of_a_tier:
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    for process in [frontend_of(busy), *busy.workers("PD"), *busy.workers("encode")]:
        for _, family in families(process):
            for sample in family.samples:
                exposed.setdefault(sample.name, set()).update(sample.labels)
    assert unknown([*dashboard_queries(), *alert_queries()], exposed) == []
