"""Images made to fill the memory or keep a decoder busy: each is refused, quickly and politely."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from tests.media import images
from tests.media.conftest import check_politeness
from tests.media.images import (
    LIMITS,
    gif_with,
    jpeg_segment,
    jpeg_with,
    noise,
    png,
    png_chunk,
    saved,
)
from trtllm_mm_cache.errors import InvalidImageError, MediaTooLargeError
from trtllm_mm_cache.media import decode_image, probe_image
from trtllm_mm_cache.settings import MB, ImageLimits

# In the service Pillow's warnings are dropped; here pytest would turn them into errors.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

Read = Callable[[bytes, ImageLimits], object]
BOTH = pytest.mark.parametrize("read", [probe_image, decode_image])


BOMBS = {
    "png": images.png_bomb(30_000, 30_000),
    "png, a long line": images.png_bomb(2**31 - 1, 1),
    "png, both sides": images.png_bomb(2**31 - 1, 2**31 - 1),
    "jpeg": images.jpeg_of_size(65_500, 65_500),
    "gif": images.gif_of_size(65_535, 65_535),
    "gif, frame": images.gif_of_size(65_535, 65_535, frame=True),
    "gif, frame a little too large": images.gif_of_size(10_000, 10_000, frame=True),
    "webp": images.webp_canvas(1 << 24, 1 << 24),
    "webp, canvas for libwebp": images.webp_canvas(16_383, 16_383),
    "webp lossless": images.webp_lossless_size(16_383, 16_383),
    "bmp": images.bmp_of_size(40_000, 40_000),
    "bmp, negative width": images.bmp_of_size(-5, 5),
    "bmp, top down": images.bmp_of_size(40_000, -40_000),
    "tiff": images.tiff_of_size(40_000, 40_000),
    "tiff, lzw": images.tiff_of_size(100_000, 60_000, compression=5),
    "tiff, 32 bit": images.tiff_of_size(2**32 - 1, 2**32 - 1),
}


@BOTH
@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs(name: str, read: Read) -> None:
    with pytest.raises(MediaTooLargeError) as caught:
        read(BOMBS[name], LIMITS)
    check_politeness(caught.value)


def test_a_webp_canvas_is_judged_before_its_decoder_exists() -> None:
    data = saved(noise("RGBA"), "WEBP")
    assert data[12:16] == b"VP8X"
    assert probe_image(data, LIMITS).width == 37
    with pytest.raises(MediaTooLargeError, match="37x23 pixels, more than the limit of 10"):
        probe_image(data, ImageLimits(max_image_megapixels=1e-5))
    with pytest.raises(MediaTooLargeError, match="16777216x16777216"):
        probe_image(BOMBS["webp"], LIMITS)


def test_bombs_take_no_memory() -> None:
    """All of them, in a process of its own, within what the process has before plus 64 MB."""
    script = """
import re
import resource
from tests.media import images
from tests.media.test_costly_images import BOMBS
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import decode_image
from trtllm_mm_cache.settings import MB, ImageLimits
decode_image(images.saved(images.noise(size=(200, 200)), "JPEG"), images.LIMITS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in BOMBS.values():
    try:
        decode_image(data, images.LIMITS)
    except MmCacheError:
        continue
    raise SystemExit("a bomb was decoded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, "kilobytes"


def test_the_pixel_limit_is_exact() -> None:
    data = saved(noise(size=(100, 50)), "PNG")
    assert probe_image(data, ImageLimits(max_image_megapixels=0.0050001, max_side=100))
    with pytest.raises(MediaTooLargeError, match="100x50 pixels, more than the limit of 4999"):
        probe_image(data, ImageLimits(max_image_megapixels=0.0049999))
    with pytest.raises(MediaTooLargeError, match="limit of 99"):
        probe_image(data, ImageLimits(max_side=99))


def test_a_narrow_strip_is_refused_however_few_its_pixels() -> None:
    """A processor that scales by the shorter side made 22 million by 336 pixels of 65,535 by 1."""
    strip = saved(noise("L", (20_000, 100)), "PNG")
    assert probe_image(strip, LIMITS)
    for size in ((20_001, 100), (100, 20_001), (1, 201), (1, 65_535)):
        with pytest.raises(MediaTooLargeError, match="one side more than 200 times the other"):
            probe_image(saved(Image.new("L", size), "PNG"), LIMITS)
    with pytest.raises(MediaTooLargeError, match="1x100000 pixels, a side longer"):
        probe_image(saved(Image.new("L", (1, 100_000)), "PNG"), LIMITS)


def test_more_bytes_than_a_file_may_have_are_not_looked_into() -> None:
    data = saved(noise(), "PNG")
    assert decode_image(data, ImageLimits(max_file_size_mb=len(data) / MB))
    with pytest.raises(MediaTooLargeError, match=f"{len(data)} bytes"):
        decode_image(data, ImageLimits(max_file_size_mb=(len(data) - 1) / MB))


MANY = 100_000
INFLATING = zlib.compress(bytes(1_000_000))
EXIF_SEGMENT = jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(65_000))

# Before they were bounded, each of these took seconds to hours at the 50 MB that a file may have.
COSTLY = {
    "png, empty chunks": png(8, 8, png_chunk(b"prIv") * MANY),
    "png, text chunks": png(8, 8, png_chunk(b"tEXt", b"a\0b") * MANY),
    "png, inflating text": png(8, 8, png_chunk(b"zTXt", b"a\0\0" + INFLATING) * 900),
    "png, inflating profiles": png(8, 8, png_chunk(b"iCCP", b"a\0\0" + INFLATING) * 900),
    "png, profiles behind the pixels": saved(noise(), "PNG")[:-12]
    + png_chunk(b"iCCP", b"a\0\0" + INFLATING) * 2000
    + png_chunk(b"IEND"),
    "png, empty chunks behind the pixels": saved(noise(), "PNG")[:-12]
    + png_chunk(b"prIv") * 2 * MANY
    + png_chunk(b"IEND"),
    "png, pixels in crumbs": png(
        500, 500, *[png_chunk(b"IDAT", bytes((each,))) for each in zlib.compress(bytes(750_500), 0)[:MANY]]
    ),
    "jpeg, empty segments": jpeg_with(jpeg_segment(0xFE, b"") * MANY),
    "jpeg, fill bytes": jpeg_with(b"\xff" * MANY),
    "jpeg, exif over exif": jpeg_with(EXIF_SEGMENT * 600),
    "jpeg, scans": images.jpeg_of_scans(1000),
    "jpeg, empty segments between scans": images.jpeg_of_scans(0)[:-2]
    + jpeg_segment(0xFE, b"") * MANY
    + b"\xff\xd9",
    "gif, comments in crumbs": gif_with(b"\x21\xfe" + b"\x01a" * MANY + b"\0"),
    "gif, empty extensions": gif_with(b"\x21\xfe\x00" * MANY),
    "bmp, runs of one": images.bmp_of_runs(2000, 2000),
    "tiff, tags": images.tiff(*[(number, 3, 1, 1) for number in range(65_535)]),
    "tiff, tags over the same bytes": images.tiff(
        *[(number, 1, 5_000_000, 50_000) for number in range(40_000, 44_000)], body=bytes(6_000_000)
    ),
}


# Each of these may be read to its end, or refused; it must not cost more than its size explains.
OVERGROWN = {
    "webp, tags over the same bytes": lambda: saved(
        noise(), "WEBP", exif=images.exif_of_tags(4000, 1_000_000)
    ),
    "png, tags over the same bytes": lambda: saved(
        noise(), "PNG", exif=b"Exif\0\0" + images.exif_of_tags(4000, 1_000_000)
    ),
    "jpeg, tags over the same bytes": lambda: jpeg_with(
        jpeg_segment(0xE1, b"Exif\0\0" + images.exif_of_tags(2000, 40_000))
    ),
    "webp, huge exif": lambda: saved(noise(), "WEBP", exif=images.exif_of_tags(1, 30_000_000)),
    "webp, huge profile": lambda: saved(noise(), "WEBP", icc_profile=bytes(30_000_000)),
    "png, huge exif": lambda: saved(noise(), "PNG", exif=b"Exif\0\0" + images.exif_of_tags(1, 7_000_000)),
    "tiff, huge profile": lambda: saved(noise(), "TIFF", icc_profile=bytes(30_000_000)),
    "gif, frames": lambda: images.many_frames("GIF", 3000),
    "tiff, pages": lambda: images.many_frames("TIFF", 500),
    "jpeg, mpo": lambda: images.many_frames("MPO", 500),
}


@pytest.mark.parametrize("name", OVERGROWN)
def test_what_is_not_looked_at_costs_nothing(name: str) -> None:
    data = OVERGROWN[name]()
    started = time.process_time()
    tracemalloc.start()
    try:
        decode_image(data, LIMITS)
    except InvalidImageError as error:
        check_politeness(error)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.process_time() - started < 5
    assert most < 4 * len(data) + 32 * 1024**2


@pytest.mark.parametrize("name", COSTLY)
def test_files_that_keep_a_decoder_busy(name: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidImageError) as caught:
        decode_image(COSTLY[name], LIMITS)
    assert time.process_time() - started < 5
    check_politeness(caught.value)


def test_a_jpeg_of_as_many_scans_as_encoders_write_is_fine() -> None:
    assert decode_image(images.jpeg_of_scans(40), LIMITS).size == (1000, 1000)


def test_large_metadata_is_read_up_to_its_limit() -> None:
    assert decode_image(jpeg_with(EXIF_SEGMENT * 100), LIMITS).size == (16, 16)
    with pytest.raises(InvalidImageError, match="metadata"):
        probe_image(jpeg_with(EXIF_SEGMENT * 300), LIMITS)
