"""The compose files are valid for compose's own schema, and what they say fits together."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.containers import COMPOSE, COMPOSE_TRTLLM, ROLES, ROOT, composed

SCHEMA = json.loads((Path(__file__).parent / "schemas/compose-spec.json").read_text())
DEPLOYMENTS = {"transformers": composed(COMPOSE), "trtllm": composed(COMPOSE, COMPOSE_TRTLLM)}

every_deployment = pytest.mark.parametrize("whole", DEPLOYMENTS.values(), ids=DEPLOYMENTS)


def check(document: Any) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(document)


@pytest.mark.parametrize("file", [COMPOSE, COMPOSE_TRTLLM], ids=lambda each: each.name)
def test_each_file_fits_the_schema(file: Path) -> None:
    check(yaml.safe_load(file.read_text()))


@every_deployment
def test_both_together_fit_the_schema(whole: dict[str, Any]) -> None:
    check(whole)


def test_the_schema_refuses_what_compose_does_not_know() -> None:
    wrong = deepcopy(DEPLOYMENTS["transformers"])
    wrong["services"]["pd"]["shm_sise"] = wrong["services"]["pd"].pop("shm_size")
    with pytest.raises(jsonschema.ValidationError, match="shm_sise"):
        check(wrong)


@every_deployment
def test_a_process_may_do_no_more_than_it_must(whole: dict[str, Any]) -> None:
    for role in ROLES:
        service = whole["services"][role]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert "network_mode" not in service


@every_deployment
def test_nothing_but_the_frontend_is_published_and_that_on_loopback(whole: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in whole["services"].items() if "ports" in service}
    assert published == {"frontend": ["127.0.0.1:8000:8000"]}


@every_deployment
def test_what_is_referred_to_is_there(whole: dict[str, Any]) -> None:
    assert set(whole["services"]) == {"etcd", *ROLES}
    for role in ROLES:
        service = whole["services"][role]
        assert service["depends_on"] == {"etcd": {"condition": "service_healthy"}}
        assert set(service["secrets"]) <= set(whole["secrets"])
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert "healthcheck" in whole["services"]["etcd"]


def test_each_kind_of_worker_has_a_gpu() -> None:
    services = DEPLOYMENTS["trtllm"]["services"]
    devices = {
        role: services[role]["deploy"]["resources"]["reservations"]["devices"] for role in ("encode", "pd")
    }
    assert [each["capabilities"] for kind in devices.values() for each in kind] == [["gpu"], ["gpu"]]
    assert "reservations" not in services["frontend"]["deploy"]["resources"]


def test_the_secret_is_not_in_the_repository() -> None:
    file = DEPLOYMENTS["transformers"]["secrets"]["mm_cache"]["file"]
    assert file == "${MM_CACHE_SECRET:-./mm-cache.secret}"
    assert "*.secret" in (ROOT / ".gitignore").read_text().splitlines()
