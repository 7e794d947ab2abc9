"""Workers that are in discovery and have no part in the deployment's secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import data_url, new_image, png, wait_until
from tests.redteam.deployment import MODEL, Deployment, answers, caller, deployed
from tests.services import Service
from trtllm_mm_cache.runtime.membership import PROOF_FIELD, Membership

TEXT = {
    "model": MODEL.name,
    "token_ids": [1, 2, 3],
    "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
    "sampling_options": {"temperature": 0},
}


@pytest.fixture
def other_secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("another deployment's secret, or a guess")
    file.chmod(0o600)
    return file


@pytest.fixture
def false_encode_worker(deployment: Deployment, other_secret: Path) -> Iterator[Service]:
    """The product's own encode worker, of the same model, which lies in nothing but its secret."""
    service = deployment.another("false-encode", "encode", MM_CACHE_SECRET_FILE=str(other_secret))
    service.start()
    service.wait_ready()
    _sees_encode_workers(deployment, 2)
    yield service
    service.kill()
    _sees_encode_workers(deployment, 1)


def _sees_encode_workers(deployment: Deployment, count: int) -> None:
    seen = "trtllm_mm_cache_encode_workers"
    wait_until(lambda: deployment.pd.process.metric(seen) == count, 30, f"not {count} encode workers")


def test_a_false_encode_worker_is_not_believed_and_the_true_one_answers(
    deployment: Deployment, false_encode_worker: Service, deal: Deal
) -> None:
    before = deployment.pd.process.metric("trtllm_mm_cache_encode_retries_total")
    for _ in range(8):  # whichever of the two the key chooses
        asked = deal()
        assert deployment.ask(*asked.parts) == asked.answer
    assert deployment.pd.process.metric("trtllm_mm_cache_encode_retries_total") > before
    assert "without the deployment's secret" in false_encode_worker.log.read_text()
    assert false_encode_worker.process.metric("trtllm_mm_cache_encodes_total") == 0


def test_a_false_encode_worker_alone_brings_an_error_and_no_answer(
    tmp_path: Path, other_secret: Path, deal: Deal
) -> None:
    with deployed(tmp_path) as deployment:
        hit, miss = deal(), deal()
        assert deployment.ask(*hit.parts) == hit.answer
        false = deployment.another("false-encode", "encode", MM_CACHE_SECRET_FILE=str(other_secret))
        false.start()
        false.wait_ready()
        _sees_encode_workers(deployment, 2)
        deployment.encode.stop()
        _sees_encode_workers(deployment, 1)
        with pytest.raises(openai.InternalServerError):
            deployment.ask(*miss.parts)
        assert deployment.pd.process.metric("trtllm_mm_cache_errors_total", code="not_a_member") == 1
        assert deployment.ask(*hit.parts) == hit.answer, "hits and text go on"
        false.kill()


async def test_a_false_pd_worker_is_told_nothing(
    deployment: Deployment, other_secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls the encode worker as a PD worker does: nothing is computed, exported or told for it."""
    monkeypatch.setenv("DYN_FILE_KV", str(deployment.discovery))
    variables = {"MM_CACHE_SECRET_FILE": str(other_secret), "MM_CACHE_ALLOW_UNPROVEN_REQUESTS": "1"}
    false = deployment.another("false-pd", "pd", *elsewhere("false"), **variables)
    request = TEXT | {"multi_modal_data": {"image_url": [{"Url": data_url(png(new_image()))}]}}
    metric = deployment.encode.process.metric
    counted = ("trtllm_mm_cache_encodes_total", "trtllm_mm_cache_embeddings_total")
    before = [metric(name) for name in counted]
    false.start()
    try:
        false.wait_ready()
        async with caller("dyn://false.pd.generate") as client:
            with pytest.raises(Exception, match="does not"):
                await answers(client, request, client.instance_ids()[0])
        assert false.process.metric("trtllm_mm_cache_errors_total", code="not_a_member") == 1
    finally:
        false.kill()
    assert [metric(name) for name in counted] == before
    assert "refused a call of encode without the deployment's secret" in deployment.encode.log.read_text()


def _members(secret: Path) -> Membership:
    return Membership(secret.read_bytes().strip())


def elsewhere(name: str) -> tuple[str, ...]:
    """Options of a PD worker to which no frontend sends requests about the deployment's model."""
    return "--endpoint", f"dyn://{name}.pd.generate", "--served-model-name", name


async def test_a_pd_worker_answers_only_who_belongs(
    deployment: Deployment, other_secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_FILE_KV", str(deployment.discovery))
    strict = deployment.another("strict-pd", "pd", *elsewhere("strict"))
    strict.start()
    try:
        strict.wait_ready()
        members, strangers = _members(deployment.discovery / "secret"), _members(other_secret)
        async with caller("dyn://strict.pd.generate") as client:
            (instance,) = client.instance_ids()
            call = members.call("generate", instance)
            proof, first, *_ = await answers(client, TEXT | {PROOF_FIELD: call.proof()}, instance)
            call.check(proof[PROOF_FIELD])
            assert len(first["token_ids"]) == 1
            for payload in (TEXT, TEXT | {PROOF_FIELD: strangers.call("generate", instance).proof()}):
                with pytest.raises(Exception, match="belongs to this deployment"):
                    await answers(client, payload, instance)
        assert strict.process.metric("trtllm_mm_cache_errors_total", code="not_a_member") == 2
    finally:
        strict.kill()
