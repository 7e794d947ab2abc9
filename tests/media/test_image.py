"""Decoding: the pixels that Hugging Face's loader gives, from every format and mode that is accepted.

What is transparent is dropped here, as that loader does; `test_transparency.py` has it shown on a background.
"""

from __future__ import annotations

import importlib.util
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.media import images
from tests.media.images import animated, exif, frames, noise, saved
from trtllm_mm_cache.errors import UnsupportedMediaError
from trtllm_mm_cache.media import ImageInfo, decode_image, probe_image
from trtllm_mm_cache.settings import ImageLimits

LIMITS = ImageLimits(transparent_background="none")

load_image = pytest.importorskip("transformers.image_utils").load_image

# Pillow's own advice on palettes with transparency, which the reference loader sets off.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def reference(data: bytes) -> np.ndarray:
    """What Hugging Face's loader makes of the same file."""
    with Image.open(io.BytesIO(data)) as image:
        return pixels(load_image(image))


def bundled_photographs() -> list[Path]:
    """Every image file that the two packages bring along, but for one that Pillow cannot identify."""
    found: list[Path] = []
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent / folder
        found += sorted(path for path in root.iterdir() if path.suffix in {".png", ".jpg", ".gif", ".tif"})
    assert len(found) > 20
    return [path for path in found if path.name != "multipage_rgb.tif"]


@pytest.mark.parametrize("path", bundled_photographs(), ids=lambda path: path.name)
def test_real_photographs(path: Path) -> None:
    data = path.read_bytes()
    expected = reference(data)
    assert np.array_equal(pixels(decode_image(data, LIMITS)), expected)
    info = probe_image(data, LIMITS)
    assert (info.height, info.width) == expected.shape[:2]


CASES = {
    "png rgb": saved(noise("RGB"), "PNG"),
    "png rgba": saved(noise("RGBA"), "PNG"),
    "png grey": saved(noise("L"), "PNG"),
    "png grey, alpha": saved(noise("LA"), "PNG"),
    "png palette": saved(noise("P"), "PNG"),
    "png palette, one transparent": saved(noise("P"), "PNG", transparency=3),
    "png palette, alphas": saved(noise("P"), "PNG", transparency=bytes(range(256))),
    "png rgb, transparent colour": saved(noise("RGB"), "PNG", transparency=(1, 2, 3)),
    "png grey, transparent colour": saved(noise("L"), "PNG", transparency=7),
    "png bilevel": saved(noise("1"), "PNG"),
    "png with profile": saved(noise("RGB"), "PNG", icc_profile=b"profile" * 1000),
    "png animated": animated("PNG"),
    "jpeg rgb": saved(noise("RGB"), "JPEG"),
    "jpeg grey": saved(noise("L"), "JPEG"),
    "jpeg cmyk": saved(noise("CMYK"), "JPEG"),
    "jpeg progressive": saved(noise("RGB", (300, 200)), "JPEG", progressive=True),
    "jpeg restarts": saved(noise("RGB", (300, 200)), "JPEG", restart_marker_blocks=1),
    "jpeg with much metadata": saved(noise("RGB"), "JPEG", icc_profile=bytes(3_000_000)),
    "jpeg mpo": saved(noise(seed=1), "MPO", save_all=True, append_images=[noise(seed=2), noise(seed=3)]),
    "webp lossy": saved(noise("RGB"), "WEBP"),
    "webp lossless": saved(noise("RGBA"), "WEBP", lossless=True),
    "webp animated": animated("WEBP"),
    "gif": saved(noise("P"), "GIF"),
    "gif transparent": saved(noise("P"), "GIF", transparency=5),
    "gif animated": animated("GIF"),
    "bmp": saved(noise("RGB"), "BMP"),
    "bmp palette": saved(noise("P"), "BMP"),
    "bmp bilevel": saved(noise("1"), "BMP"),
    "tiff": saved(noise("RGB"), "TIFF"),
    "tiff cmyk": saved(noise("CMYK"), "TIFF"),
    "tiff grey": saved(noise("L"), "TIFF"),
    "tiff float": saved(noise("F"), "TIFF"),
    "tiff lzw": saved(noise("RGBA"), "TIFF", compression="tiff_lzw"),
    "tiff deflate": saved(noise("RGB"), "TIFF", compression="tiff_adobe_deflate"),
    "tiff packbits": saved(noise("RGB"), "TIFF", compression="packbits"),
    "tiff group4": saved(noise("1"), "TIFF", compression="group4"),
    "tiff pages": animated("TIFF"),
    "tiff many strips": saved(noise("RGB", (5, 3000)), "TIFF", tiffinfo={278: 1}),
    "png 16 bit rgb": images.png_of_16_bits((31, 17)),
    "png 16 bit rgba": images.png_of_16_bits((31, 17), alpha=True),
    "png many frames": images.many_frames("PNG", 60),
    "gif many frames": images.many_frames("GIF", 300),
    "webp many frames": images.many_frames("WEBP", 100),
    "tiff many pages": images.many_frames("TIFF", 300),
    "jpeg mpo of many": images.many_frames("MPO", 100),
    "png one pixel": saved(noise("RGB", (1, 1)), "PNG"),
    "png 1 x 60000": saved(noise("L", (1, 60_000)), "PNG"),
    "jpeg 60000 x 1": saved(noise("RGB", (60_000, 1)), "JPEG"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_format_and_mode_equals_the_reference_loader(name: str) -> None:
    data = CASES[name]
    narrow = ImageLimits(max_aspect_ratio=60_000, transparent_background="none")
    expected = reference(data)
    image = decode_image(data, narrow)
    assert np.array_equal(pixels(image), expected)
    info = probe_image(data, narrow)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.format == name.split(maxsplit=1)[0].upper()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(image_format: str) -> None:
    """The reference loader clips it to white; this is the one place where the two differ."""
    image = noise("I;16")
    data = saved(image, image_format)
    expected = (np.asarray(image) >> 8).astype(np.uint8)
    decoded = pixels(decode_image(data, LIMITS))
    assert all(np.array_equal(decoded[..., channel], expected) for channel in range(3))
    assert (reference(data) == 255).mean() > 0.9


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
        ("TIFF", "L"),
        ("TIFF", "RGB"),
    ],
)
def test_exif_orientation_is_applied_once(image_format: str, mode: str, orientation: int) -> None:
    image = noise(mode, (24, 16))
    data = saved(image, image_format, exif=exif(orientation))
    upright = decode_image(data, LIMITS)
    assert upright.size == ((24, 16) if orientation < 5 else (16, 24))
    assert np.array_equal(pixels(upright), reference(data))
    # Nothing further down may turn it again.
    assert np.array_equal(pixels(load_image(upright)), pixels(upright))
    plain = pixels(decode_image(saved(image, image_format), LIMITS))
    assert np.array_equal(pixels(upright), plain) is (orientation == 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation: int) -> None:
    data = saved(noise(), "JPEG", exif=exif(orientation))
    assert np.array_equal(pixels(decode_image(data, LIMITS)), reference(data))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(image_format: str) -> None:
    data = animated(image_format)
    first, second, *_ = frames(data)
    decoded = pixels(decode_image(data, LIMITS))
    assert np.array_equal(decoded, pixels(first))
    assert not np.array_equal(decoded, pixels(second))


def test_no_metadata_is_left() -> None:
    data = saved(noise("P"), "PNG", transparency=3, icc_profile=b"profile", exif=exif(6), dpi=(72, 72))
    image = decode_image(data, LIMITS)
    assert image.info == {}
    assert not image.getexif()
    assert not isinstance(image, ImageFile.ImageFile)


def test_the_header_is_enough_for_the_probe() -> None:
    data = saved(noise(size=(640, 480)), "JPEG")
    assert probe_image(data[:700], LIMITS) == ImageInfo("JPEG", 640, 480)


def test_the_bytes_decide_the_format() -> None:
    png = saved(noise(), "PNG")
    assert probe_image(png, ImageLimits(formats=frozenset({"PNG"}))).format == "PNG"
    with pytest.raises(UnsupportedMediaError, match=r"\(GIF, JPEG\)"):
        probe_image(png, ImageLimits(formats=frozenset({"JPEG", "GIF"})))


def test_the_result_does_not_depend_on_threads() -> None:
    sources = [
        CASES[name] for name in ("jpeg progressive", "png palette", "webp lossy", "gif", "tiff lzw")
    ] * 8
    start = threading.Barrier(8)

    def decode(data: bytes) -> bytes:
        if not start.broken:
            start.wait(timeout=10)
        return decode_image(data, LIMITS).tobytes()

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, sources))
    assert together == [decode_image(data, LIMITS).tobytes() for data in sources]
