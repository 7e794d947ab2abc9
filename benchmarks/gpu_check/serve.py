"""A random model served by the real parts of both workers: where a miss goes, and times to first token.

python -m benchmarks.gpu_check.serve miss|ttft FOLDER SIZE
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.model import make_model
from benchmarks.gpu_check.near import NearStack, jpeg, near_stack
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.huggingface.model_files import load_processor, read_config
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs
from trtllm_mm_cache.engines.transformers.preprocess import ImagePreprocessor
from trtllm_mm_cache.media import decode_image
from trtllm_mm_cache.settings import EncodeSettings
from trtllm_mm_cache.transfer.checksum import checksum

IMAGES = {
    "448x448": (448, 448),
    "1024x1024": (1024, 1024),
    "1920x1080": (1920, 1080),
    "2400x1808": (2400, 1808),
}
REPEATS = 5
BURST = 16


def say(**line: Any) -> None:
    """Print a result."""
    print(json.dumps(line), flush=True)


async def timed(work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Return the milliseconds that `work` took and what it returned."""
    began = time.perf_counter()
    result = await work()
    return 1e3 * (time.perf_counter() - began), result


def median(values: list[float]) -> float:
    """Return the median, rounded to microseconds."""
    return round(statistics.median(values), 3)


def parts_of(stack: NearStack, file: bytes) -> Iterator[tuple[str, float]]:
    """Encode an image and yield what each step took, in ms."""
    marks = [time.perf_counter()]

    def step(name: str) -> tuple[str, float]:
        marks.append(time.perf_counter())
        return name, 1e3 * (marks[-1] - marks[-2])

    image = decode_image(file, EncodeSettings(model_path="none").images)
    yield step("decode")
    prepared = stack.encoder.preprocess(EncodeItem(image))
    yield step("preprocess")
    (item,) = stack.encoder.encode([prepared])
    yield step("tower")
    if not isinstance(item, EncodedItem):
        raise item
    reservation = stack.cache.reserve("store", item.tensor.nbytes, owner="gpu_check")
    reservation.write(item.tensor, computed=True)
    yield step("store_copy")
    checksum(reservation.address, reservation.nbytes)
    yield step("store_checksum")
    reservation.abandon()
    yield "mb", item.tensor.nbytes / 1e6


def torchvision_preprocessor(model: Path) -> ImagePreprocessor | None:
    """Return the preprocessor that an encode worker has with `image_processor: torchvision`, if it can be."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    config, architecture = read_config(model)
    device = TransformersEngineArgs().resolved_device()
    return ImagePreprocessor(
        load_processor(model, config, backend="torchvision"), config, architecture, device
    )


def preprocess_ms(preprocess: ImagePreprocessor, file: bytes) -> float:
    """Return what preprocessing one image takes, its end on the device included."""
    image = decode_image(file, EncodeSettings(model_path="none").images)
    began = time.perf_counter()
    preprocess(EncodeItem(image))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


async def miss(stack: NearStack, model: Path) -> None:
    """Print the parts of a miss for each size of image."""
    other = torchvision_preprocessor(model)
    for name, size in IMAGES.items():
        rounds = [dict(parts_of(stack, jpeg(seed, *size))) for seed in range(1 + REPEATS)]
        if other is not None:
            for seed, one in enumerate(rounds):
                one["preprocess_by_torchvision"] = preprocess_ms(other, jpeg(seed, *size))
        line = {part: median([one[part] for one in rounds[1:]]) for part in rounds[0]}
        whole = []
        for seed in range(100, 101 + REPEATS):
            file = jpeg(seed, *size)
            spent, lease = await timed(lambda: stack.lease(file))  # noqa: B023
            whole.append(spent)
            lease.release()
        say(image=name, ms=line, whole_ms=median(whole[1:]), mapped=stack.reader.mapped)


async def ttft(stack: NearStack, model: Path) -> None:
    """Print times to first token for one image, ten images, and a burst for one new image."""
    del model
    for name, size in IMAGES.items():
        await one_image(stack, name, size)
    files = [jpeg(500 + number, 1024, 1024) for number in range(10)]
    cold, (token, length) = await timed(lambda: stack.first_token(stack.request(10), files))
    warm, (again, _) = await timed(lambda: stack.first_token(stack.request(10), files))
    text = stack.text_request(length)
    plain, _ = await timed(lambda: stack.first_token(text, []))
    say(images="ten of 1024x1024", miss=cold, hit=warm, text=plain, tokens=length, same=token == again)
    before, file, request = stack.encodes(), jpeg(900, 1024, 1024), stack.request(1)
    spent, answers = await timed(
        lambda: asyncio.gather(*(stack.first_token(request, [file]) for _ in range(BURST)))
    )
    say(
        burst=BURST,
        ms=round(spent, 1),
        encodes=stack.encodes() - before,
        answers=len({token for token, _ in answers}),
    )


async def one_image(stack: NearStack, name: str, size: tuple[int, int]) -> None:
    """Print miss, hit and text of equal length for an image of one size."""
    request = stack.request(1)
    times: dict[str, list[float]] = {"miss": [], "hit": [], "text": []}
    same, length = True, 0
    for seed in range(200, 201 + REPEATS):
        file = jpeg(seed, *size)
        cold, (token, length) = await timed(lambda: stack.first_token(request, [file]))  # noqa: B023
        warm, (again, _) = await timed(lambda: stack.first_token(request, [file]))  # noqa: B023
        text = stack.text_request(length)
        plain, _ = await timed(lambda: stack.first_token(text, []))  # noqa: B023
        same = same and token == again
        for kind, spent in (("miss", cold), ("hit", warm), ("text", plain)):
            times[kind].append(spent)
    line = {kind: median(values[1:]) for kind, values in times.items()}
    say(image=name, ms=line, hit_of_text=round(line["hit"] / line["text"], 3), tokens=length, same=same)


async def main(parts: str, folder: Path, size: str) -> None:
    """Make the model if need be, load it, measure."""
    made = await asyncio.to_thread(make_model, folder / "model", size)
    torch.cuda.empty_cache()
    if not torch.cuda.is_available():
        for name in ("1920x1080", "2400x1808"):
            IMAGES.pop(name)
    began = time.perf_counter()
    async with near_stack(folder / "model") as stack:
        gpu_mb = round(torch.cuda.memory_allocated() / 1e6) if torch.cuda.is_available() else 0
        say(size=size, load_s=round(time.perf_counter() - began, 1), gpu_mb=gpu_mb, **made)
        for part in parts.split(","):
            await {"miss": miss, "ttft": ttft}[part](stack, folder / "model")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
