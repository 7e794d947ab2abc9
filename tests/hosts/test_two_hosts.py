"""The deployment over two hosts, healthy: the answers of the single process, embeddings over the cable."""

from __future__ import annotations

import random

from tests.e2e.conftest import generate_answer
from tests.engines.contract import chat_case
from tests.hosts.deployment import Deployment
from tools.demo_model.pictures import draw, random_scene
from tools.demo_model.questions import KINDS, ask_any

ENCODES = "trtllm_mm_cache_encodes_total"
HITS = "dynamo_component_embedding_cache_hits_total"
ONE_PICTURE = [kind for kind, (pictures, _) in KINDS.items() if pictures == 1]


def test_pictures_get_the_answers_of_the_single_process(deployment: Deployment) -> None:
    rng = random.Random(5)
    encodes, hits = deployment.far_metric(ENCODES), deployment.metric(HITS)
    received = deployment.near.received_bytes()
    right = 0
    for _ in range(6):
        scene = random_scene(rng)
        question = ask_any([scene], ONE_PICTURE, rng)
        picture = draw(scene)
        expected = generate_answer(chat_case(deployment.model, [picture], ["", question.text]), 24)
        assert [deployment.ask(picture, question.text) for _ in range(2)] == [expected, expected]
        right += expected == question.answer
    assert right >= 5, "the model itself knows its pictures"
    assert deployment.far_metric(ENCODES) == encodes + 6
    assert deployment.metric(HITS) == hits + 6
    assert deployment.near.received_bytes() > received
