"""Dashboard and alert rules: well-formed, and nothing asked for that is not there.

That workers really expose what they ask for is held in tests/e2e/test_metrics.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml

from tests.deploy.queries import ALERTS, DEPLOY, Query, alert_queries, dashboard_queries, selectors
from trtllm_mm_cache import errors


@pytest.mark.parametrize("query", [*dashboard_queries(), *alert_queries()], ids=lambda query: query.where)
def test_every_expression_is_promql(query: Query) -> None:
    assert selectors(query)


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
            assert rule["annotations"]["summary"].endswith("."), rule["alert"]


def codes(root: type[errors.MmCacheError]) -> set[str]:
    """The codes of an error class and of all below it."""
    tree = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, root)}
    return {each.code for each in tree}


def test_every_error_code_is_in_the_alert_that_it_belongs_to() -> None:
    """A new code in errors.py must be sorted in here: into an alert, or into what needs none."""
    every = codes(errors.MmCacheError)
    alerts = {
        "MmCacheEncodeErrors": codes(errors.EncodeError)
        | codes(errors.TransferError)
        | codes(errors.NotAMemberError)
        | codes(errors.CacheError) - {"integrity"},
        "MmCacheOverloaded": {"overloaded"},
        "MmCacheEngineErrors": {"internal_error", "generation_error", "integrity"},
    }
    the_client_is_at_fault = codes(errors.RequestError)
    of_the_frontend = codes(errors.PdUnavailableError)  # MmCacheNoPdWorker watches for the cause
    the_worker_ends_with_it = codes(errors.ConfigurationError) | {"discovery_lost", "engine_lost"}

    found = {
        query.where.removeprefix("alert "): {code for code in every if re.fullmatch(pattern, code)}
        for query in alert_queries()
        for pattern in re.findall(r'code=~?"([^"]+)"', query.expression)
    }
    assert found == alerts
    sorted_in = [*alerts.values(), the_client_is_at_fault, of_the_frontend, the_worker_ends_with_it]
    assert sorted(code for group in sorted_in for code in group) == sorted(every)


def test_alerts_name_no_code_that_no_error_has() -> None:
    every = codes(errors.MmCacheError)
    for query in alert_queries():
        for pattern in re.findall(r'code=~?"([^"]+)"', query.expression):
            for alternative in pattern.split("|"):
                assert any(re.fullmatch(alternative, code) for code in every), alternative


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)")
@pytest.mark.parametrize("command", ["check config prometheus.yml", "test rules alerts_test.yml"])
def test_promtool_agrees(command: str) -> None:
    ended = subprocess.run(
        ["promtool", *command.split()],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
