"""Write deploy/grafana/dashboard.json from the panels in tools/dashboard_panels.py.

    python tools/grafana_dashboard.py [--check]

With --check nothing is written, and a file that differs is an error. Import the JSON into Grafana 10 or newer
and choose a Prometheus data source; docs/operations.md says how.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dashboard_panels import CACHE, COLUMNS, ROWS, Panel

TARGET = Path(__file__).resolve().parents[1] / "deploy/grafana/dashboard.json"
HEIGHT = 8


def dashboard() -> dict[str, Any]:
    """Return the dashboard's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], **_at(0, top, COLUMNS, 1)}
        )
        top, left = top + 1, 0
        for panel in row:
            height = HEIGHT // 2 if panel.kind == "stat" else HEIGHT
            panels.append(_panel(panel, _at(left, top, panel.width, height)))
            left += panel.width
            if left == COLUMNS:
                top, left = top + height, 0
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    return {
        "title": "trtllm_mm_cache",
        "uid": "trtllm-mm-cache",
        "tags": ["dynamo", "multimodal", "cache"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _model_variable()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def _at(left: int, top: int, width: int, height: int) -> dict[str, Any]:
    return {"gridPos": {"x": left, "y": top, "w": width, "h": height}}


def _panel(panel: Panel, place: dict[str, Any]) -> dict[str, Any]:
    # Thresholds and calculation are said even where they are plain: Grafana's own are red from 80 on.
    steps = [{"color": colour, "value": value} for value, colour in panel.thresholds]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none"}
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stacked else 8,
            "stacking": stacking,
            "thresholdsStyle": {"mode": "dashed" if len(panel.thresholds) > 1 else "off"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        **({"options": {"reduceOptions": {"calcs": ["lastNotNull"]}}} if panel.kind == "stat" else {}),
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(panel.expressions.items())
        ],
        **place,
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _model_variable() -> dict[str, Any]:
    query = f"label_values({CACHE}_entries, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "model"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> None:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is stale")
    text = json.dumps(dashboard(), indent=2) + "\n"
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"{TARGET} is stale: run python tools/grafana_dashboard.py")


if __name__ == "__main__":
    main()
