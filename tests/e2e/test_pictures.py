"""The main job: pictures in, the model's own answers out, one encode a picture."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import Oracle
from tests.e2e.image_server import ImageServer
from tests.e2e.stack import Stack, data_url, message, new_picture, png, wait_until

QUESTION = "What is this?"


def test_text_alone_is_answered_as_the_model_does(stack: Stack, oracle: Oracle) -> None:
    before = stack.encodes()
    assert stack.ask("Hello there!") == oracle([], ["Hello there!"])
    assert stack.encodes() == before


def test_a_picture_is_encoded_once_and_answered_as_the_model_does(stack: Stack, oracle: Oracle) -> None:
    picture = new_picture()
    expected = oracle([picture], ["", QUESTION])
    before = stack.encodes()
    assert stack.ask(picture, QUESTION) == expected
    assert stack.encodes() == before + 1
    assert stack.ask(picture, QUESTION) == expected
    assert stack.encodes() == before + 1


def test_one_content_from_three_sources_is_one_encode(stack: Stack, images: ImageServer) -> None:
    body = png(new_picture())
    urls = [data_url(body), images.put("/first.png", body), images.put("/second.png", body)]
    before = stack.encodes()
    answers = {stack.ask(url, QUESTION) for url in urls}
    assert len(answers) == 1
    assert stack.encodes() == before + 1


def test_changed_bytes_under_one_url_are_a_new_encode_and_a_new_answer(
    stack: Stack, images: ImageServer, oracle: Oracle
) -> None:
    first, second = new_picture(), new_picture()
    expected = [oracle([picture], ["", QUESTION], 16) for picture in (first, second)]
    assert expected[0] != expected[1], "the two pictures must not look alike to the model"
    before = stack.encodes()
    url = images.put("/changing.png", png(first))
    assert stack.ask(url, QUESTION, max_tokens=16) == expected[0]
    images.put("/changing.png", png(second))
    assert stack.ask(url, QUESTION, max_tokens=16) == expected[1]
    assert stack.encodes() == before + 2


def test_an_unchanged_url_costs_a_304(stack: Stack, images: ImageServer) -> None:
    url = images.put("/steady.png", png(new_picture()))
    stack.ask(url, QUESTION)
    images.answers.clear()
    stack.ask(url, QUESTION)
    assert 304 in images.answers["/steady.png"]


def test_several_pictures_of_which_one_repeats(stack: Stack, oracle: Oracle) -> None:
    first, second = new_picture(140, 84), new_picture(84, 112)
    before = stack.encodes()
    answer = stack.ask("One:", first, "two:", second, "and again:", first, "Which differ?")
    assert answer == oracle([first, second, first], ["One:", "two:", "and again:", "Which differ?"])
    assert stack.encodes() == before + 2


def test_a_mix_of_hit_and_miss_in_either_order(stack: Stack, oracle: Oracle) -> None:
    known, fresh, other = new_picture(), new_picture(168, 56), new_picture(56, 168)
    stack.ask(known, QUESTION)
    before = stack.encodes()
    assert stack.ask(known, fresh, QUESTION) == oracle([known, fresh], ["", "", QUESTION])
    assert stack.ask(other, known, QUESTION) == oracle([other, known], ["", "", QUESTION])
    assert stack.encodes() == before + 2


def test_swapped_pictures_are_another_question(stack: Stack, oracle: Oracle) -> None:
    first, second = new_picture(), new_picture()
    one = oracle([first, second], ["", "", QUESTION], 24)
    other = oracle([second, first], ["", "", QUESTION], 24)
    assert one != other, "the order must matter to the model"
    assert stack.ask(first, second, QUESTION, max_tokens=24) == one
    assert stack.ask(second, first, QUESTION, max_tokens=24) == other


def test_sixteen_requests_for_one_new_picture_are_one_encode(stack: Stack) -> None:
    picture = new_picture(336, 336)
    before = stack.encodes()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: stack.ask(picture, QUESTION), range(16)))
    assert len(set(answers)) == 1
    assert stack.encodes() == before + 1


def test_streaming_gives_the_same_text_in_pieces_and_the_expanded_prompt_in_usage(
    stack: Stack, oracle: Oracle
) -> None:
    picture = new_picture()
    stream = stack.client.chat.completions.create(
        model=stack.model,
        messages=[message(picture, QUESTION)],
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == oracle([picture], ["", QUESTION])
    assert sum(piece != "" for piece in pieces) > 1
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 8
    # 112 x 112 pixels in patches of 14, merged 2 x 2: 16 rows in place of one placeholder.
    text_only = stack.client.chat.completions.create(
        model=stack.model, messages=[message(QUESTION)], max_tokens=1
    ).usage
    assert text_only is not None
    vision_markers = 2
    assert usage.prompt_tokens == text_only.prompt_tokens + 16 + vision_markers


def test_a_client_that_leaves_stops_the_computation_and_leaves_nothing(stack: Stack) -> None:
    (pd,) = stack.workers("PD")
    stream = stack.client.chat.completions.create(
        model=stack.model,
        messages=[message(new_picture(), QUESTION)],
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert pd.metric("trtllm_mm_cache_leased_bytes", arena="cache") > 0
    stream.close()
    wait_until(
        lambda: pd.metric("trtllm_mm_cache_leased_bytes", arena="cache") == 0,
        10,
        "the lease was not returned",
    )
    assert "outcome=stopped" in pd.log.read_text()
    assert stack.ask("Still there?")


PHOTOGRAPHS = (
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/camera.png",  # grey
    "skimage/data/horse.png",  # RGBA, almost two-valued
    "skimage/data/page.png",  # grey, 384 x 191
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
    "skimage/data/color.png",  # RGBA
)


def photograph(name: str) -> bytes:
    """Return the file of a real photograph or scan that comes with a package."""
    package, _, path = name.partition("/")
    return (resources.files(package) / path).read_bytes()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_real_photographs(stack: Stack, oracle: Oracle, name: str) -> None:
    body = photograph(name)
    before = stack.encodes()
    assert stack.ask(data_url(body), QUESTION) == oracle([rgb(body)], ["", QUESTION])
    assert stack.encodes() == before + 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "RGB"])
def test_every_mode_of_a_photograph(stack: Stack, mode: str) -> None:
    flower = rgb(photograph("sklearn/datasets/images/flower.jpg")).resize((160, 106))
    source = flower.convert("L").convert("LA") if mode == "LA" else flower.convert(mode)
    before = stack.encodes()
    assert stack.ask(source, QUESTION)
    assert stack.encodes() == before + 1


def rgb(body: bytes) -> Image.Image:
    """Decode a file as it is, without transparency."""
    with Image.open(io.BytesIO(body)) as picture:
        return picture.convert("RGB")


def test_a_file_below_the_allowed_folder(stack: Stack, tmp_path: Path) -> None:
    picture = new_picture()
    arguments = Path(f"/proc/{stack.workers('PD')[0].pid}/cmdline").read_bytes().decode().split("\0")
    folder = Path(arguments[arguments.index("--allowed-local-media-path") + 1])
    (folder / "inside.png").write_bytes(png(picture))
    (tmp_path / "outside.png").write_bytes(png(picture))
    assert stack.ask(f"file://{folder}/inside.png", QUESTION) == stack.ask(picture, QUESTION)
    with pytest.raises(Exception, match="image 1"):
        stack.ask(f"file://{tmp_path}/outside.png", QUESTION)
