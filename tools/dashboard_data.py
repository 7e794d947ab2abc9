"""What the panels of a Grafana dashboard show: their own queries, asked of a Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

POINTS = 300
"""As many points as a panel asks for at most; Grafana asks for about one a pixel."""


@dataclass(frozen=True)
class Span:
    """What is looked at: `start` and `end` in seconds since 1970, scraped every `scrape_s` seconds."""

    start: float
    end: float
    scrape_s: float

    @property
    def step_s(self) -> float:
        """Seconds between two points."""
        return max(self.scrape_s, (self.end - self.start) / POINTS)

    @property
    def rate_s(self) -> float:
        """Grafana's `$__rate_interval`: at least four scrapes, so that a lost one leaves no gap."""
        return max(self.step_s + self.scrape_s, 4 * self.scrape_s)


@dataclass(frozen=True)
class Series:
    """One line of a panel. A value is NaN where the expression has none, as 0 / 0."""

    legend: str
    times: list[float]
    values: list[float]


def panel_series(
    prometheus: httpx2.Client, dashboard: Mapping[str, Any], panel: Mapping[str, Any], span: Span
) -> list[Series]:
    """Ask every query of `panel`; in the order of its legend. `prometheus` has the server as its base URL.

    Raises `httpx2.HTTPStatusError` where Prometheus refuses a query.
    """
    found = []
    for target in panel["targets"]:
        answer = prometheus.get(
            "/api/v1/query_range",
            params={
                "query": with_variables(target["expr"], dashboard, span),
                "start": span.start,
                "end": span.end,
                "step": span.step_s,
            },
        )
        answer.raise_for_status()
        for each in answer.json()["data"]["result"]:
            times, values = zip(*each["values"], strict=True)
            legend = with_labels(target["legendFormat"], each["metric"])
            found.append(Series(legend, list(times), [float(value) for value in values]))
    return found


def with_variables(expression: str, dashboard: Mapping[str, Any], span: Span) -> str:
    """Put in what Grafana does: the rate interval, and all values of each of the dashboard's variables."""
    expression = expression.replace("$__rate_interval", f"{round(1000 * span.rate_s)}ms")
    for variable in dashboard["templating"]["list"]:
        if "allValue" in variable:
            expression = expression.replace(f"${variable['name']}", variable["allValue"])
    return expression


def with_labels(legend: str, labels: Mapping[str, str]) -> str:
    """Put labels in for a legend's `{{name}}`."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)
