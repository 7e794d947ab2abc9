"""Reading what Dynamo's frontend sends: complete, and with the field's name when it cannot be served."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_mm_cache.engines.base import Constraint, SamplingParams
from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.pd.reference import Reference
from trtllm_mm_cache.pd.request import PdRequest, parse_request


def wire(**changes: Any) -> dict[str, Any]:
    """Return a request as Dynamo 1.6.1's frontend sends it for a chat with one image."""
    request: dict[str, Any] = {
        "model": "m",
        "token_ids": [1, 5, 2],
        "multi_modal_data": {"image_url": [{"Url": "data:image/png;base64,AA=="}]},
        "stop_conditions": {
            "max_tokens": 9,
            "stop": ["END"],
            "stop_token_ids": None,
            "stop_token_ids_visible": None,
            "stop_token_ids_hidden": [7],
            "min_tokens": None,
            "ignore_eos": None,
            "max_thinking_tokens": None,
        },
        "sampling_options": {
            "n": None,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 11,
            "presence_penalty": None,
            "use_beam_search": None,
        },
        "output_options": {"logprobs": None},
        "eos_token_ids": [2],
        "routing": {},
        "annotations": [],
        "extra_args": {"formatted_prompt": "<image>Hi", "messages": [], "mm_hashes": ["x"]},
    }
    return request | changes


def parse(payload: Any, max_images: int = 4) -> PdRequest:
    return parse_request(payload, "id-1", max_images=max_images)


def test_everything_arrives() -> None:
    request = parse(wire())
    assert request.references == (Reference("image", "data:image/png;base64,AA=="),)
    assert request.generation.request_id == "id-1"
    assert request.generation.token_ids == (1, 5, 2)
    assert request.generation.prompt_text == "<image>Hi"
    assert request.generation.sampling == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, seed=11, stop=("END",), stop_token_ids=(2, 7)
    )


def test_an_image_may_come_as_bytes_and_is_known_by_what_it_holds() -> None:
    parts = [{"Bytes": b"png"}, {"Url": "data:,png"}, {"Bytes": b"png"}, {"Url": "http://h/i.png"}]
    one, url, again, fetched = parse(wire(multi_modal_data={"image_url": parts})).references
    assert (one.nbytes, url.nbytes, fetched.nbytes) == (3, len("data:,png"), 0)
    assert one == again
    assert hash(one) == hash(again)
    assert one != url
    assert (one.take(), url.take(), fetched.take()) == (b"png", "data:,png", "http://h/i.png")
    assert one.take() == b"", "taken once"


def test_the_payload_keeps_no_media() -> None:
    payload = wire()
    parse(payload)
    assert "multi_modal_data" not in payload


def test_text_alone_has_no_images() -> None:
    payload = wire()
    del payload["multi_modal_data"], payload["extra_args"]
    request = parse(payload)
    assert request.references == ()
    assert request.generation.prompt_text is None


def test_ignore_eos_takes_the_end_token_out_of_the_stop_tokens() -> None:
    stop = {"ignore_eos": True, "stop_token_ids_hidden": [2, 7]}
    sampling = parse(wire(stop_conditions=stop)).generation.sampling
    assert sampling.ignore_eos
    assert sampling.stop_token_ids == (7,)


@pytest.mark.parametrize("value", [None, 0, -1])
def test_top_k_may_be_off(value: int | None) -> None:
    assert parse(wire(sampling_options={"top_k": value})).generation.sampling.top_k is None


@pytest.mark.parametrize(
    ("changes", "salt"),
    [
        ({"routing": {"cache_salt": "tenant-1"}}, "tenant-1"),
        ({"extra_args": {"nvext": {"cache_salt": "tenant-2"}}}, "tenant-2"),
        ({}, None),
    ],
)
def test_the_salt_is_found_where_the_frontend_puts_it(changes: dict[str, Any], salt: str | None) -> None:
    assert parse(wire(**changes)).generation.cache_salt == salt


@pytest.mark.parametrize(
    "changes",
    [{"mm_processor_kwargs": {"max_pixels": 9}}, {"extra_args": {"mm_processor_kwargs": {"max_pixels": 9}}}],
)
def test_processor_kwargs_are_found_where_the_frontend_puts_them(changes: dict[str, Any]) -> None:
    assert parse(wire(**changes)).processor_kwargs == {"max_pixels": 9}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"multi_modal_data": {"video_url": [{"Url": "x"}]}}, "video_url"),
        ({"multi_modal_data": {"image_url": [{"Decoded": {}}]}}, "image 1"),
        ({"multi_modal_data": {"image_url": [{"Url": "a"}] * 5}}, "image_url"),
        ({"multi_modal_data": {"image_url": "a"}}, "multi_modal_data.image_url"),
        ({"mm_processor_kwargs": [1]}, "mm_processor_kwargs"),
        ({"routing": {"cache_salt": 5}}, "cache_salt"),
        ({"sampling_options": {"temperature": -1}}, "temperature"),
        ({"sampling_options": {"temperature": "hot"}}, "temperature"),
        ({"sampling_options": {"top_p": 0}}, "top_p"),
        ({"sampling_options": {"n": 0}}, "n:"),
        ({"sampling_options": {"n": 129}}, "n:"),
        ({"sampling_options": {"presence_penalty": 2.5}}, "presence_penalty"),
        ({"sampling_options": {"frequency_penalty": "1"}}, "frequency_penalty"),
        ({"sampling_options": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"sampling_options": {"min_p": 1.5}}, "min_p"),
        ({"sampling_options": {"best_of": 2}}, "best_of"),
        ({"sampling_options": {"logit_bias": {"a": 1.0}}}, "logit_bias"),
        ({"sampling_options": {"logit_bias": {"-1": 1.0}}}, "logit_bias"),
        ({"sampling_options": {"logit_bias": {"٣": 1.0}}}, "logit_bias"),
        ({"sampling_options": {"logit_bias": {True: 1.0}}}, "logit_bias"),
        ({"sampling_options": {"logit_bias": {"1": 101.0}}}, "logit_bias"),
        ({"sampling_options": {"logit_bias": {str(i): 1.0 for i in range(2000)}}}, "logit_bias"),
        ({"sampling_options": {"guided_decoding": {"grammar": "x"}}}, "guided_grammar"),
        ({"sampling_options": {"guided_decoding": {"structural_tag": "x"}}}, "guided_structural_tag"),
        ({"sampling_options": {"guided_decoding": {"json": {}, "regex": "a"}}}, "guided_json, guided_regex"),
        ({"sampling_options": {"guided_decoding": {"json": [1]}}}, "guided_json"),
        ({"sampling_options": {"guided_decoding": {"json": {"a": float("nan")}}}}, "guided_json"),
        ({"sampling_options": {"guided_decoding": {"regex": 5}}}, "guided_regex"),
        ({"sampling_options": {"guided_decoding": {"regex": "x" * 70_000}}}, "guided_regex"),
        ({"sampling_options": {"guided_decoding": {"choice": []}}}, "guided_choice"),
        ({"sampling_options": {"guided_decoding": {"choice": ["a", ""]}}}, "guided_choice"),
        ({"sampling_options": {"guided_decoding": "x"}}, "guided_decoding"),
        ({"output_options": {"logprobs": 21}}, "logprobs"),
        ({"output_options": {"logprobs": True}}, "logprobs"),
        ({"output_options": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"output_options": {"prompt_logprobs": -1}}, "prompt_logprobs"),
        ({"routing": {"lora_name": "adapter"}}, "lora_name"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens"),
        ({"stop_conditions": {"max_tokens": "9"}}, "max_tokens"),
        ({"stop_conditions": {"max_tokens": 2**70}}, "max_tokens"),
        ({"stop_conditions": {"max_tokens": True}}, "max_tokens"),
        ({"stop_conditions": {"max_tokens": 1.5}}, "max_tokens"),
        ({"stop_conditions": {"min_tokens": -1}}, "min_tokens"),
        ({"stop_conditions": {"stop": "END"}}, "stop"),
        ({"stop_conditions": {"stop": [5]}}, "stop"),
        ({"stop_conditions": {"stop": ["x"] * 65}}, "stop"),
        ({"stop_conditions": {"stop": ["x" * 2000]}}, "stop"),
        ({"stop_conditions": {"stop_token_ids": [-1]}}, "stop_token_ids"),
        ({"stop_conditions": {"stop_token_ids": [1] * 5000}}, "stop_token_ids"),
        ({"stop_conditions": {"ignore_eos": "yes"}}, "ignore_eos"),
        ({"stop_conditions": []}, "stop_conditions"),
        ({"sampling_options": {"temperature": float("nan")}}, "temperature"),
        ({"sampling_options": {"temperature": float("inf")}}, "temperature"),
        ({"sampling_options": {"temperature": 1e300}}, "temperature"),
        ({"sampling_options": {"temperature": "0.5"}}, "temperature"),
        ({"sampling_options": {"top_p": float("nan")}}, "top_p"),
        ({"sampling_options": {"top_p": 1.01}}, "top_p"),
        ({"sampling_options": {"top_k": -2}}, "top_k"),
        ({"sampling_options": {"top_k": 1.5}}, "top_k"),
        ({"sampling_options": {"seed": 2**64}}, "seed"),
        ({"sampling_options": {"seed": "1"}}, "seed"),
        ({"sampling_options": {"n": "many"}}, "n:"),
        ({"token_ids": [2**40]}, "token_ids"),
        ({"token_ids": [1.0]}, "token_ids"),
        ({"token_ids": "123"}, "token_ids"),
        ({"multi_modal_data": {"image_url": [{"Url": 5}]}}, "image 1"),
        ({"multi_modal_data": {"image_url": ["a"]}}, "multi_modal_data.image_url"),
        (
            {"multi_modal_data": {"image_url": [{"Url": "a"}] * 500}},
            "image_url: 500 images are more than the 4",
        ),
        ({"multi_modal_data": {"x" * 100_000: [{}]}}, "only images"),
        ({"multi_modal_data": []}, "multi_modal_data"),
        ({"mm_processor_kwargs": "text"}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": 0}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"a": "x" * 10_000}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"a": list(range(1000))}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"a": [[[[[[[[[1]]]]]]]]]}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"a": float("inf")}}, "mm_processor_kwargs"),
        ({"extra_args": {"mm_processor_kwargs": []}}, "mm_processor_kwargs"),
        ({"extra_args": {"mm_processor_kwargs": False}}, "mm_processor_kwargs"),
        ({"extra_args": {"formatted_prompt": 5}}, "formatted_prompt"),
        ({"extra_args": {"nvext": [1]}}, "nvext"),
        ({"extra_args": {"nvext": {"cache_salt": 0}}}, "cache_salt"),
        ({"extra_args": "x"}, "extra_args"),
        ({"routing": {"cache_salt": False}}, "cache_salt"),
        ({"routing": {"cache_salt": "x" * 2000}}, "cache_salt"),
        ({"routing": "x"}, "routing"),
    ],
)
def test_what_is_not_served_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(wire(**changes))
    assert field in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.http_status == 400


@pytest.mark.parametrize("payload", [None, [], "text", {}])
def test_a_request_of_another_shape_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidRequestError):
        parse(payload)


def test_what_bends_the_choice_arrives() -> None:
    options = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "min_p": 0.1,
        "n": 3,
        "logit_bias": {"17": -100, 18: 2.5, "19": 0},
        "guided_decoding": {"json": None, "regex": "a+", "json_object": False},
    }
    told = {"logprobs": 0, "prompt_logprobs": 2}
    sampling = parse(wire(sampling_options=options, output_options=told)).generation.sampling
    assert sampling == SamplingParams(
        max_tokens=9,
        stop=("END",),
        stop_token_ids=(2, 7),
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.2,
        min_p=0.1,
        logit_bias={17: -100, 18: 2.5},
        logprobs=0,
        prompt_logprobs=2,
        constraint=Constraint("regex", "a+"),
        choices=3,
    )


@pytest.mark.parametrize(
    ("guided", "constraint"),
    [
        ({"json": {"type": "object"}}, Constraint("json_schema", '{"type": "object"}')),
        ({"json": '{"type": "object"}'}, Constraint("json_schema", '{"type": "object"}')),
        ({"json_object": True}, Constraint("json_schema", '{"type": "object"}')),
        ({"choice": ["a.b", "c d"]}, Constraint("regex", r"a\.b|c\ d")),
        ({}, None),
        (None, None),
    ],
)
def test_each_way_to_say_what_an_answer_must_be(guided: Any, constraint: Constraint | None) -> None:
    sampling = parse(wire(sampling_options={"guided_decoding": guided})).generation.sampling
    assert sampling.constraint == constraint


@pytest.mark.parametrize(("name", "off"), [("n", 1), ("presence_penalty", 0.0), ("repetition_penalty", 1.0)])
def test_options_at_their_neutral_value_pass(name: str, off: float) -> None:
    assert parse(wire(sampling_options={name: off})).generation.sampling == SamplingParams(
        max_tokens=9, stop=("END",), stop_token_ids=(2, 7)
    )


def test_an_adapter_that_the_worker_has_is_taken_and_no_other() -> None:
    payload = wire(routing={"lora_name": "cats"})
    request = parse_request(dict(payload), "r", max_images=4, adapters=("cats", "dogs"))
    assert request.generation.lora_name == "cats"
    assert parse(wire(routing={"lora_name": None})).generation.lora_name is None
    for name in ("birds", "", 5, ["cats"]):
        with pytest.raises(InvalidRequestError, match="lora_name: this worker has no adapter of this name"):
            parse_request(wire(routing={"lora_name": name}), "r", max_images=4, adapters=("cats", "dogs"))
