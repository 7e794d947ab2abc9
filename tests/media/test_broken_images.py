"""Images that are broken, or are none: refused with an error of ours, never half an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.media import images
from tests.media.conftest import check_politeness
from tests.media.images import (
    LIMITS,
    animated,
    gif_with,
    jpeg_segment,
    jpeg_with,
    noise,
    png,
    png_chunk,
    saved,
)
from trtllm_mm_cache.errors import InvalidImageError, MmCacheError, UnsupportedMediaError
from trtllm_mm_cache.media import decode_image, probe_image
from trtllm_mm_cache.settings import ImageLimits

# In the service Pillow's warnings are dropped; here pytest would turn them into errors.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

Read = Callable[[bytes, ImageLimits], object]
BOTH = pytest.mark.parametrize("read", [probe_image, decode_image])


@BOTH
@pytest.mark.parametrize("compression", [6, 7, 34925, 50000, 50001, 32809])
def test_codecs_inside_tiff_are_not_accepted(compression: int, read: Read) -> None:
    """JPEG old and new, LZMA, Zstandard, WebP, ThunderScan."""
    with pytest.raises(UnsupportedMediaError, match="compression"):
        read(images.tiff_of_size(16, 16, compression), LIMITS)


NOT_IMAGES = {
    "text": b"hello, this is no image at all",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "svg with declaration": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg/>',
    "html": b"<!doctype html><html></html>",
    "pdf": b"%PDF-1.7\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "ico": saved(noise(size=(16, 16)), "ICO"),
    "ppm": saved(noise(size=(16, 16)), "PPM"),
    "tga": saved(noise(size=(16, 16)), "TGA"),
    "pcx": saved(noise(size=(16, 16)), "PCX"),
    "jpeg 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100),
    "psd": b"8BPS\x00\x01" + bytes(100),
    "riff, but wave": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100),
    "heic": b"\x00\x00\x00\x18ftypheic" + bytes(100),
    "one byte": b"\x89",
    "zip": b"PK\x03\x04" + bytes(100),
    "spaces before png": b"  " + saved(noise(), "PNG"),
}


@BOTH
@pytest.mark.parametrize("name", NOT_IMAGES)
def test_other_formats(name: str, read: Read) -> None:
    with pytest.raises(UnsupportedMediaError) as caught:
        read(NOT_IMAGES[name], LIMITS)
    assert "BMP, GIF, JPEG, PNG, TIFF, WEBP" in str(caught.value)


BROKEN = {
    "empty": b"",
    "png signature": b"\x89PNG\r\n\x1a\n",
    "png, no width": png(0, 5),
    "png, no height": png(5, 0),
    "png, no pixels chunk": png(5, 5),
    "png, colour type": png(5, 5, png_chunk(b"IDAT", b""), colour=5),
    "png, bad checksum": saved(noise(), "PNG")[:29] + b"\0\0\0\0" + saved(noise(), "PNG")[33:],
    "png, chunk longer than the file": png(5, 5)[:33] + b"\x7f\xff\xff\xffIDAT",
    "jpeg marker": b"\xff\xd8\xff",
    "jpeg, no frame": b"\xff\xd8\xff\xd9",
    "jpeg, no size": images.jpeg_of_size(0, 0),
    "gif signature": b"GIF89a",
    "gif, no frame": gif_with(b";"),
    "webp signature": b"RIFF\x00\x00\x00\x00WEBP",
    "webp, nothing behind": b"RIFF\x0c\x00\x00\x00WEBPVP8 \x00\x00\x00\x00",
    "bmp signature": b"BM",
    "bmp, no size": images.bmp_of_size(0, 0),
    "tiff signature": b"II*\0",
    "tiff, directory outside": b"II*\0\xff\xff\xff\x7f",
    "tiff, directory in itself": b"II*\0\x00\x00\x00\x00",
    "tiff, no size": images.tiff_of_size(0, 0),
    "tiff, pixels outside": images.tiff_of_size(200, 200),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(name: str) -> None:
    with pytest.raises(InvalidImageError) as caught:
        decode_image(BROKEN[name], LIMITS)
    check_politeness(caught.value)


HONEST = {
    "png": saved(noise("RGBA"), "PNG"),
    "png palette": saved(noise("P"), "PNG", transparency=2),
    "jpeg": saved(noise(), "JPEG", exif=images.exif(6)),
    "jpeg progressive": saved(noise(), "JPEG", progressive=True),
    "webp": saved(noise(), "WEBP"),
    "webp lossless": saved(noise("RGBA"), "WEBP", lossless=True, exif=images.exif(3)),
    "webp animated": animated("WEBP"),
    "gif": saved(noise("P"), "GIF"),
    "gif animated": animated("GIF"),
    "bmp": saved(noise(), "BMP"),
    "tiff": saved(noise(), "TIFF"),
    "tiff lzw": saved(noise(), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", HONEST)
def test_a_truncated_image_is_refused_or_complete(name: str) -> None:
    """Never an image with a grey lower half. (Some formats end in bytes that hold no pixels.)"""
    data = HONEST[name]
    whole = np.asarray(decode_image(data, LIMITS))
    cuts = {int(cut) for cut in np.linspace(1, len(data) - 1, 120)}
    refused = 0
    for cut in sorted(cuts):
        try:
            image = decode_image(data[:cut], LIMITS)
        except (InvalidImageError, UnsupportedMediaError) as error:
            refused += 1
            check_politeness(error)
        else:
            assert np.array_equal(np.asarray(image), whole), f"cut at {cut} of {len(data)}"
    assert refused > 20


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize(
    "tail", [b"\0" * 5000, b"garbage" * 999, b"PK\x03\x04<script>", b"\xff\xda\0\2" * 30_000]
)
def test_what_trails_an_image_does_not_matter(name: str, tail: bytes) -> None:
    expected = decode_image(HONEST[name], LIMITS).tobytes()
    assert decode_image(HONEST[name] + tail, LIMITS).tobytes() == expected


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\5hello",
    ],
)
def test_broken_exif_turns_nothing(exif: bytes) -> None:
    data = jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + exif))
    plain = decode_image(jpeg_with(), LIMITS)
    assert decode_image(data, LIMITS).tobytes() == plain.tobytes()


@given(
    st.sampled_from(sorted(HONEST)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), max_size=6),
    st.floats(0.1, 1),
)
@settings(max_examples=400, deadline=None)
def test_any_damage_gives_an_image_or_an_error_of_ours(
    name: str, damage: list[tuple[float, bytes]], kept: float
) -> None:
    data = bytearray(HONEST[name])
    for place, piece in damage:
        at = int(place * len(data))
        data[at : at + len(piece)] = piece
    mangled = bytes(data[: int(kept * len(data))])
    try:
        info = probe_image(mangled, LIMITS)
        image = decode_image(mangled, LIMITS)
    except MmCacheError as error:
        check_politeness(error)
    else:
        assert image.mode == "RGB"
        assert sorted(image.size) == sorted((info.width, info.height))


@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*"]),
    st.binary(max_size=300),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_behind_a_signature(signature: bytes, rest: bytes) -> None:
    try:
        decode_image(signature + rest, LIMITS)
    except MmCacheError as error:
        check_politeness(error)
