"""Decoding: the pixels that Hugging Face's loader gives, from every format and mode that is accepted."""

from __future__ import annotations

import importlib.util
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.media import pictures
from tests.media.pictures import SETTINGS, animated, exif, frames, picture, saved
from trtllm_mm_cache.errors import UnsupportedMediaError
from trtllm_mm_cache.media import ImageInfo, MediaSettings, decode_image, probe_image

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
    """Every picture file that the two packages bring along, but for one that Pillow cannot identify."""
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
    assert np.array_equal(pixels(decode_image(data, SETTINGS)), expected)
    info = probe_image(data, SETTINGS)
    assert (info.height, info.width) == expected.shape[:2]


CASES = {
    "png rgb": saved(picture("RGB"), "PNG"),
    "png rgba": saved(picture("RGBA"), "PNG"),
    "png grey": saved(picture("L"), "PNG"),
    "png grey, alpha": saved(picture("LA"), "PNG"),
    "png palette": saved(picture("P"), "PNG"),
    "png palette, one transparent": saved(picture("P"), "PNG", transparency=3),
    "png palette, alphas": saved(picture("P"), "PNG", transparency=bytes(range(256))),
    "png rgb, transparent colour": saved(picture("RGB"), "PNG", transparency=(1, 2, 3)),
    "png grey, transparent colour": saved(picture("L"), "PNG", transparency=7),
    "png bilevel": saved(picture("1"), "PNG"),
    "png with profile": saved(picture("RGB"), "PNG", icc_profile=b"profile" * 1000),
    "png animated": animated("PNG"),
    "jpeg rgb": saved(picture("RGB"), "JPEG"),
    "jpeg grey": saved(picture("L"), "JPEG"),
    "jpeg cmyk": saved(picture("CMYK"), "JPEG"),
    "jpeg progressive": saved(picture("RGB", (300, 200)), "JPEG", progressive=True),
    "jpeg restarts": saved(picture("RGB", (300, 200)), "JPEG", restart_marker_blocks=1),
    "jpeg with much metadata": saved(picture("RGB"), "JPEG", icc_profile=bytes(3_000_000)),
    "jpeg mpo": saved(
        picture(seed=1), "MPO", save_all=True, append_images=[picture(seed=2), picture(seed=3)]
    ),
    "webp lossy": saved(picture("RGB"), "WEBP"),
    "webp lossless": saved(picture("RGBA"), "WEBP", lossless=True),
    "webp animated": animated("WEBP"),
    "gif": saved(picture("P"), "GIF"),
    "gif transparent": saved(picture("P"), "GIF", transparency=5),
    "gif animated": animated("GIF"),
    "bmp": saved(picture("RGB"), "BMP"),
    "bmp palette": saved(picture("P"), "BMP"),
    "bmp bilevel": saved(picture("1"), "BMP"),
    "tiff": saved(picture("RGB"), "TIFF"),
    "tiff cmyk": saved(picture("CMYK"), "TIFF"),
    "tiff grey": saved(picture("L"), "TIFF"),
    "tiff float": saved(picture("F"), "TIFF"),
    "tiff lzw": saved(picture("RGBA"), "TIFF", compression="tiff_lzw"),
    "tiff deflate": saved(picture("RGB"), "TIFF", compression="tiff_adobe_deflate"),
    "tiff packbits": saved(picture("RGB"), "TIFF", compression="packbits"),
    "tiff group4": saved(picture("1"), "TIFF", compression="group4"),
    "tiff pages": animated("TIFF"),
    "tiff many strips": saved(picture("RGB", (5, 3000)), "TIFF", tiffinfo={278: 1}),
    "png 16 bit rgb": pictures.png_of_16_bits((31, 17)),
    "png 16 bit rgba": pictures.png_of_16_bits((31, 17), alpha=True),
    "png many frames": pictures.many_frames("PNG", 60),
    "gif many frames": pictures.many_frames("GIF", 300),
    "webp many frames": pictures.many_frames("WEBP", 100),
    "tiff many pages": pictures.many_frames("TIFF", 300),
    "jpeg mpo of many": pictures.many_frames("MPO", 100),
    "png one pixel": saved(picture("RGB", (1, 1)), "PNG"),
    "png 1 x 60000": saved(picture("L", (1, 60_000)), "PNG"),
    "jpeg 60000 x 1": saved(picture("RGB", (60_000, 1)), "JPEG"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_format_and_mode_equals_the_reference_loader(name: str) -> None:
    data = CASES[name]
    narrow = MediaSettings(max_image_aspect_ratio=60_000)
    expected = reference(data)
    image = decode_image(data, narrow)
    assert np.array_equal(pixels(image), expected)
    info = probe_image(data, narrow)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.format == name.split(maxsplit=1)[0].upper()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(image_format: str) -> None:
    """The reference loader clips it to white; this is the one place where the two differ."""
    image = picture("I;16")
    data = saved(image, image_format)
    expected = (np.asarray(image) >> 8).astype(np.uint8)
    decoded = pixels(decode_image(data, SETTINGS))
    assert all(np.array_equal(decoded[..., channel], expected) for channel in range(3))
    assert (reference(data) == 255).mean() > 0.9


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("TIFF", "L")]
)
def test_exif_orientation_is_applied_once(image_format: str, mode: str, orientation: int) -> None:
    image = picture(mode, (24, 16))
    data = saved(image, image_format, exif=exif(orientation))
    upright = decode_image(data, SETTINGS)
    assert upright.size == ((24, 16) if orientation < 5 else (16, 24))
    assert np.array_equal(pixels(upright), reference(data))
    # Nobody further down may turn it again.
    assert np.array_equal(pixels(load_image(upright)), pixels(upright))
    plain = pixels(decode_image(saved(image, image_format), SETTINGS))
    assert np.array_equal(pixels(upright), plain) is (orientation == 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation: int) -> None:
    data = saved(picture(), "JPEG", exif=exif(orientation))
    assert np.array_equal(pixels(decode_image(data, SETTINGS)), reference(data))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(image_format: str) -> None:
    data = animated(image_format)
    first, second, *_ = frames(data)
    decoded = pixels(decode_image(data, SETTINGS))
    assert np.array_equal(decoded, pixels(first))
    assert not np.array_equal(decoded, pixels(second))


def test_no_metadata_is_left() -> None:
    data = saved(picture("P"), "PNG", transparency=3, icc_profile=b"profile", exif=exif(6), dpi=(72, 72))
    image = decode_image(data, SETTINGS)
    assert image.info == {}
    assert not image.getexif()
    assert not isinstance(image, ImageFile.ImageFile)


def test_the_header_is_enough_for_the_probe() -> None:
    data = saved(picture(size=(640, 480)), "JPEG")
    assert probe_image(data[:700], SETTINGS) == ImageInfo("JPEG", 640, 480)


def test_the_bytes_decide_the_format() -> None:
    png = saved(picture(), "PNG")
    assert probe_image(png, MediaSettings(image_formats=frozenset({"PNG"}))).format == "PNG"
    with pytest.raises(UnsupportedMediaError, match=r"\(GIF, JPEG\)"):
        probe_image(png, MediaSettings(image_formats=frozenset({"JPEG", "GIF"})))


def test_the_result_does_not_depend_on_threads() -> None:
    sources = [
        CASES[name] for name in ("jpeg progressive", "png palette", "webp lossy", "gif", "tiff lzw")
    ] * 8
    start = threading.Barrier(8)

    def decode(data: bytes) -> bytes:
        if not start.broken:
            start.wait(timeout=10)
        return decode_image(data, SETTINGS).tobytes()

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, sources))
    assert together == [decode_image(data, SETTINGS).tobytes() for data in sources]
