"""What the Grafana dashboard shows: rows of panels, each with its PromQL by legend."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 24
CACHE = "dynamo_component_embedding_cache"
OURS = "trtllm_mm_cache"
ANY = 'model=~"$model"'
PD = ANY + ',dynamo_component="pd"'
ENCODE = ANY + ',dynamo_component="encode"'
IN_CACHE = PD + ',arena="cache"'


@dataclass(frozen=True)
class Panel:
    """One panel: its expressions by legend. `stat` shows the last value, `timeseries` lines over time.

    `thresholds` are values and the colours from there on: of a stat's number, or of dashed lines.
    """

    title: str
    unit: str
    expressions: dict[str, str]
    about: str
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    maximum: float | None = None
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "text"),)


def aggregate(function: str, by: str, vector: str) -> str:
    """Return an aggregation, over labels where `by` names some."""
    return f"{function} by ({by}) ({vector})" if by else f"{function}({vector})"


def rate(name: str, labels: str = PD, by: str = "") -> str:
    """Return the summed rate of a counter."""
    return aggregate("sum", by, f"rate({name}{{{labels}}}[$__rate_interval])")


def ours(name: str, labels: str = PD, by: str = "") -> str:
    """Return the summed rate of a counter of this project."""
    return rate(f"{OURS}_{name}", labels, by)


def quantile(share: float, name: str, labels: str = PD, by: str = "") -> str:
    """Return a quantile of a histogram of this project."""
    buckets = ours(f"{name}_bucket", labels, f"le, {by}" if by else "le")
    return f"histogram_quantile({share}, {buckets})"


def gauge(name: str, labels: str = PD, *, function: str = "sum", by: str = "") -> str:
    """Return a gauge of this project over all workers."""
    return aggregate(function, by, f"{OURS}_{name}{{{labels}}}")


SERVED_BY_HIT = PD + ',outcome="hit"'
HITS, MISSES = rate(f"{CACHE}_hits_total"), rate(f"{CACHE}_misses_total")
HIT_RATIO = f"{HITS} / ({HITS} + {MISSES})"
BYTE_HIT_RATIO = f"{ours('served_bytes_total', SERVED_BY_HIT)} / {ours('served_bytes_total')}"
ERRORS = rate(f"{OURS}_errors_total", ANY, "dynamo_component, code")
EVER = f"{gauge('errors_total', ANY, by='dynamo_component, code')} > 0"

ROWS: dict[str, list[Panel]] = {
    "Is it worth it": [
        Panel("Hit ratio", "percentunit", {"hits": HIT_RATIO}, "Lookups that found an embedding.", "stat", 6),
        Panel(
            "Vision tower seconds saved",
            "s",
            {"saved in a second": ours("saved_encode_seconds_total")},
            "What the entries had cost to encode, summed over their hits, for each second of the clock.",
            "stat",
            6,
        ),
        Panel("Requests", "reqps", {"served": ours("requests_total")}, "Requests that ended.", "stat", 6),
        Panel(
            "Encode workers",
            "short",
            {"live": gauge("encode_workers", function="min")},
            "In discovery, as the PD worker sees it that sees fewest. 0: every miss is answered 503.",
            "stat",
            6,
            thresholds=((None, "red"), (1, "green")),
        ),
        Panel(
            "Hit ratio over time",
            "percentunit",
            {"by lookups": HIT_RATIO, "by bytes": BYTE_HIT_RATIO},
            "Joined lookups, which waited for another's flight, count as misses.",
            maximum=1,
        ),
        Panel(
            "Time to first token, median",
            "s",
            {"{{kind}}": quantile(0.5, "time_to_first_token_seconds", by="kind")},
            "From a request's arrival at the PD worker, by what its lookups found.",
        ),
        Panel(
            "Time to first token, 99th percentile",
            "s",
            {"{{kind}}": quantile(0.99, "time_to_first_token_seconds", by="kind")},
            "As beside it.",
        ),
    ],
    "How big": [
        Panel(
            "What another capacity would have hit",
            "percentunit",
            {"{{capacity}}": gauge("what_if_hit_ratio", function="avg", by="capacity")},
            "From a sample of the keys, over at least the last 16,384 lookups. Lines close together: more "
            "memory would not help.",
            maximum=1,
        ),
        Panel(
            "Cached bytes",
            "bytes",
            {
                "cached": f"sum({CACHE}_current_bytes{{{PD}}})",
                "capacity": gauge("capacity_bytes", IN_CACHE),
            },
            "All PD workers together.",
        ),
        Panel(
            "Age at eviction, median",
            "s",
            {"{{dynamo_component}}": quantile(0.5, "eviction_age_seconds", ANY, "dynamo_component")},
            "How long evicted entries had been in the cache. Shorter than the time between a user's turns: "
            "the cache is too small.",
        ),
    ],
    "Misses": [
        Panel(
            "Lookups",
            "ops",
            {
                "hits": HITS,
                "flights": ours("flights_total"),
                "joined": ours("flights_joined_total"),
            },
            "A flight is a call for an encode; who joins it costs none.",
            stacked=True,
        ),
        Panel(
            "Encodes",
            "ops",
            {
                "vision tower": ours("encodes_total", ENCODE),
                "second-level hits": ours("embeddings_total", ENCODE + ',origin="cached"'),
                "failed": ours("encode_failures_total", ENCODE),
            },
            "Embeddings that the encode workers delivered.",
        ),
        Panel(
            "Steps of a miss, median",
            "s",
            {
                "fetch": quantile(0.5, "fetch_seconds"),
                "key": quantile(0.5, "key_seconds"),
                "encode call": quantile(0.5, "encode_call_seconds"),
                "reserve": quantile(0.5, "reserve_seconds"),
                "READ": quantile(0.5, "transfer_seconds"),
                "commit": quantile(0.5, "commit_seconds"),
            },
            "Steps 2 to 7 of docs/architecture.md.",
        ),
        Panel(
            "Vision tower, median",
            "s",
            {
                "encode, an image": quantile(0.5, "encode_seconds", ENCODE),
                "preprocess": quantile(0.5, "preprocess_seconds", ENCODE),
                "queue": quantile(0.5, "encode_queue_wait_seconds", ENCODE),
            },
            "On the encode workers.",
        ),
        Panel(
            "Images waiting for the tower",
            "short",
            {"{{instance}}": gauge("encode_queue", ENCODE, function="max", by="instance")},
            "Beyond --max-queued-images the answer is 503. The dashed line is the alert's.",
            thresholds=((None, "text"), (64, "orange")),
        ),
        Panel(
            "Bytes READ",
            "Bps",
            {"all PD workers": ours("read_bytes_total")},
            "Brought by NIXL from encode workers.",
        ),
    ],
    "Memory and health": [
        Panel(
            "Held bytes",
            "bytes",
            {
                "leased": gauge("leased_bytes"),
                "reserved": gauge("reserved_bytes"),
                "withdrawn": gauge("withdrawn_bytes"),
                "quarantined": gauge("quarantined_bytes"),
                "exports": gauge("exports_held_bytes", ENCODE),
            },
            "Bytes that eviction cannot free now.",
        ),
        Panel(
            "Errors",
            "ops",
            {"{{dynamo_component}} {{code}}": f"{ERRORS} and {EVER}"},
            "Codes as in docs/observability.md; those that have come up.",
        ),
        Panel(
            "READs that did not end well",
            "ops",
            {"{{outcome}}": ours("reads_total", PD + ',outcome!="done"', "outcome")},
            "Corrupt: the checksum did not agree; such an embedding is never cached.",
        ),
        Panel(
            "Free memory in pieces",
            "percentunit",
            {
                "{{dynamo_component}} {{arena}}": gauge(
                    "arena_fragmentation_ratio", ANY, function="max", by="dynamo_component, arena"
                )
            },
            "Share of the free bytes outside the longest hole.",
            maximum=1,
        ),
        Panel(
            "Served past the cache",
            "ops",
            {
                "uncached": ours("uncached_total"),
                "second attempts": ours("encode_retries_total"),
            },
            "Uncached: the cache was full of entries in use, or the request may not share.",
        ),
        Panel(
            "Exports never READ",
            "ops",
            {"timed out": ours("exports_total", ENCODE + ',outcome="timed_out"')},
            "A PD worker died or froze between an encode and its READ.",
        ),
    ],
}
