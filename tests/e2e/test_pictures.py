"""The main job: pictures in, true answers out that are the model's own, one encode a picture."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.cards import MAX_TOKENS, Deal, Oracle
from tests.e2e.image_server import ImageServer
from tests.e2e.stack import Stack, data_url, message, new_image, png

QUESTION = "What is this?"


def test_text_alone_is_answered_as_the_model_does(stack: Stack, oracle: Oracle) -> None:
    before = stack.encodes()
    assert stack.ask("Hello there!") == oracle([], ["Hello there!"])
    assert stack.encodes() == before


@pytest.mark.parametrize("kind", ["colour", "shape", "where", "place", "number", "describe"])
def test_a_picture_is_encoded_once_and_answered_truly_both_times(stack: Stack, deal: Deal, kind: str) -> None:
    asked = deal(kind)
    before = stack.encodes()
    for _ in ("miss", "hit"):
        assert stack.ask(*asked.parts, max_tokens=MAX_TOKENS) == asked.answer
        assert stack.encodes() == before + 1


def test_a_card_on_a_transparent_background_is_answered_truly(
    stack: Stack, deal: Deal, oracle: Oracle
) -> None:
    """Transparent black, as most programs write it, shows white; as black it makes every answer wrong."""
    asked = wrong = 0
    while asked < 20:
        card = deal("describe")
        cut_out = without_background(card.pictures[0])
        white = Image.new("RGB", cut_out.size, "white")
        white.paste(cut_out, mask=cut_out.getchannel("A"))
        if oracle([white], ["", card.text], MAX_TOKENS) == card.answer:
            asked += 1
            wrong += stack.ask(cut_out, card.text, max_tokens=MAX_TOKENS) != card.answer
    assert wrong == 0


def without_background(card: Image.Image) -> Image.Image:
    """Return the card with transparent black where its background was."""
    pixels = np.array(card.convert("RGBA"))
    colours, counts = np.unique(pixels.reshape(-1, 4), axis=0, return_counts=True)
    pixels[(pixels == colours[counts.argmax()]).all(axis=2)] = 0
    return Image.fromarray(pixels)


def test_one_content_from_three_sources_is_one_encode(stack: Stack, images: ImageServer, deal: Deal) -> None:
    asked = deal()
    body = png(asked.pictures[0])
    urls = [data_url(body), images.put("/first.png", body), images.put("/second.png", body)]
    before = stack.encodes()
    assert [stack.ask(url, asked.text) for url in urls] == [asked.answer] * 3
    assert stack.encodes() == before + 1


def test_changed_bytes_under_one_url_are_a_new_encode_and_a_new_answer(
    stack: Stack, images: ImageServer, deal: Deal
) -> None:
    before = stack.encodes()
    for asked in deal.same_question():
        url = images.put("/changing.png", png(asked.pictures[0]))
        assert stack.ask(url, asked.text) == asked.answer
    assert stack.encodes() == before + 2


def test_an_unchanged_url_costs_a_304(stack: Stack, images: ImageServer) -> None:
    url = images.put("/steady.png", png(new_image()))
    stack.ask(url, QUESTION)
    images.answers.clear()
    stack.ask(url, QUESTION)
    assert 304 in images.answers["/steady.png"]


def test_several_pictures_of_which_one_repeats(stack: Stack, oracle: Oracle) -> None:
    first, second = new_image(140, 84), new_image(84, 112)
    before = stack.encodes()
    answer = stack.ask("One:", first, "two:", second, "and again:", first, "Which differ?")
    assert answer == oracle([first, second, first], ["One:", "two:", "and again:", "Which differ?"])
    assert stack.encodes() == before + 2


@pytest.mark.parametrize("known", [0, 1], ids=["hit-miss", "miss-hit"])
def test_a_mix_of_hit_and_miss_in_either_order(stack: Stack, deal: Deal, known: int) -> None:
    asked = deal("in one picture")
    stack.ask(asked.pictures[known], QUESTION)
    before = stack.encodes()
    assert stack.ask(*asked.parts) == asked.answer
    assert stack.encodes() == before + 1


def test_swapped_pictures_are_another_answer(stack: Stack, deal: Deal) -> None:
    before = stack.encodes()
    for asked in deal.both_orders():
        assert stack.ask(*asked.parts) == asked.answer
    assert stack.encodes() == before + 2


def test_sixteen_requests_for_one_new_picture_are_one_encode(stack: Stack, deal: Deal) -> None:
    asked = deal("number")
    before = stack.encodes()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: stack.ask(*asked.parts), range(16)))
    assert answers == [asked.answer] * 16
    assert stack.encodes() == before + 1


def test_streaming_gives_the_same_text_in_pieces_and_the_expanded_prompt_in_usage(
    stack: Stack, deal: Deal
) -> None:
    asked = deal("describe")
    (picture,) = asked.pictures
    stream = stack.client.chat.completions.create(
        model=stack.model,
        messages=[message(*asked.parts)],
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == asked.answer
    assert sum(piece != "" for piece in pieces) > 1
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == ["stop"]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens >= len(pieces) > 1
    # Patches of 14 pixels, merged 2 x 2: a row for each cell of 28 in place of one placeholder.
    text_only = stack.client.chat.completions.create(
        model=stack.model, messages=[message(asked.text)], max_tokens=1
    ).usage
    assert text_only is not None
    rows, vision_markers = picture.width * picture.height // 28**2, 2
    assert usage.prompt_tokens == text_only.prompt_tokens + rows + vision_markers


def test_a_client_that_leaves_stops_the_computation_and_leaves_nothing(stack: Stack) -> None:
    (pd,) = stack.workers("PD")
    stack.leave_an_answer()
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


def test_a_file_below_the_allowed_folder(stack: Stack, deal: Deal, tmp_path: Path) -> None:
    asked = deal()
    (picture,) = asked.pictures
    arguments = list(stack.launcher.args)
    folder = Path(arguments[arguments.index("--allowed-local-media-path") + 1])
    (folder / "inside.png").write_bytes(png(picture))
    (tmp_path / "outside.png").write_bytes(png(picture))
    assert stack.ask(f"file://{folder}/inside.png", asked.text) == asked.answer
    with pytest.raises(Exception, match="image 1"):
        stack.ask(f"file://{tmp_path}/outside.png", QUESTION)
