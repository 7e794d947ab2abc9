"""The PromQL of deploy/: the dashboard's panels and the alert rules, and what each asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import promql_parser
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboard.json"
ALERTS = DEPLOY / "prometheus/alerts.yml"


@dataclass(frozen=True)
class Query:
    """One expression and where it stands."""

    where: str
    expression: str


@dataclass(frozen=True)
class Selector:
    """One metric that an expression reads: its name, and the labels it is chosen or summed by."""

    where: str
    name: str
    labels: frozenset[str]


def dashboard_queries() -> list[Query]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        Query(f"panel '{panel['title']}'", without_variables(target["expr"]))
        for panel in panels
        for target in panel.get("targets", [])
    ]


def alert_queries() -> list[Query]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [Query(f"alert {rule['alert']}", rule["expr"]) for group in groups for rule in group["rules"]]


def without_variables(expression: str) -> str:
    """Put values in for Grafana's variables, as Grafana does before it asks Prometheus."""
    return expression.replace("$__rate_interval", "1m").replace("$model", ".*")


def selectors(query: Query) -> list[Selector]:
    """Return every metric that the query reads. Raises ValueError where it is no PromQL."""
    return list(_selectors(query.where, promql_parser.parse(query.expression), frozenset()))


def _selectors(where: str, node: object, grouped: frozenset[str]) -> Iterator[Selector]:
    if isinstance(node, promql_parser.VectorSelector):
        assert node.name, f"{where}: a selector without a metric name"
        yield Selector(where, node.name, grouped | {each.name for each in node.matchers.matchers})
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from _selectors(where, node.vector_selector, grouped)
    elif isinstance(node, promql_parser.AggregateExpr):
        by = frozenset(node.modifier.labels) if node.modifier else frozenset()
        yield from _selectors(where, node.expr, grouped | by)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from _selectors(where, node.lhs, grouped)
        yield from _selectors(where, node.rhs, grouped)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from _selectors(where, argument, grouped)
    elif isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr | promql_parser.SubqueryExpr):
        yield from _selectors(where, node.expr, grouped)
    else:
        assert isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral), node


def unknown(queries: list[Query], exposed: Mapping[str, set[str]]) -> list[str]:
    """Say what the queries ask for that is not in `exposed`, sample names with their labels.

    `instance` and `job` are Prometheus' own.
    """
    complaints = []
    for selector in [selector for query in queries for selector in selectors(query)]:
        if selector.name not in exposed:
            complaints.append(f"{selector.where}: no worker exposes {selector.name}")
        elif missing := selector.labels - exposed[selector.name] - {"instance", "job"}:
            complaints.append(f"{selector.where}: {selector.name} has no label {', '.join(sorted(missing))}")
    return complaints
