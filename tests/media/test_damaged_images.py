"""Files with a hole of zeros in the middle, as a broken disk or upload leaves them, and with one bit turned.

A PNG has checksums: it is decoded whole or refused. The other formats have none over their pixels, or none
that their decoders look at; what comes out of those is another image, as with every server that decodes by
Pillow.
`docs/hostile-input.md` has the shares.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.media.images import LIMITS, animated, noise, png_chunk, saved
from trtllm_mm_cache.errors import InvalidImageError, MmCacheError
from trtllm_mm_cache.media import decode_image

PLACES = 60
smooth = noise(size=(12, 9)).resize((160, 120))

PNGS = {
    "colour": saved(smooth, "PNG"),
    "alpha": saved(smooth.convert("RGBA"), "PNG"),
    "palette": saved(smooth.convert("P"), "PNG", transparency=3),
    "stored, not compressed": saved(smooth, "PNG", compress_level=0),
    "animated": animated("PNG"),
}
OTHERS = {
    "jpeg": saved(smooth, "JPEG"),
    "jpeg progressive": saved(smooth, "JPEG", progressive=True),
    "webp": saved(smooth, "WEBP"),
    "webp lossless": saved(smooth, "WEBP", lossless=True),
    "gif": saved(smooth.convert("P"), "GIF"),
    "tiff": saved(smooth, "TIFF"),
    "tiff lzw": saved(smooth, "TIFF", compression="tiff_lzw"),
    "tiff deflate": saved(smooth, "TIFF", compression="tiff_adobe_deflate"),
    "bmp": saved(smooth, "BMP"),
}


def with_holes(data: bytes, length: int) -> list[bytes]:
    """The file with `length` zeros at `PLACES` places from its start to its end."""
    starts = [len(data) * place // PLACES for place in range(PLACES)]
    holed = [data[:at] + bytes(min(length, len(data) - at)) + data[at + length :] for at in starts]
    return [each for each in holed if each != data]


@pytest.mark.parametrize("length", [1, 4, 64, 1024])
@pytest.mark.parametrize("name", PNGS)
def test_a_png_with_a_hole_is_never_another_image(name: str, length: int) -> None:
    whole = decode_image(PNGS[name], LIMITS)
    refused = 0
    files = with_holes(PNGS[name], length)
    for file in files:
        try:
            assert decode_image(file, LIMITS) == whole
        except MmCacheError:
            refused += 1
    assert refused == len(files) > PLACES // 3


@pytest.mark.parametrize("name", PNGS)
def test_a_png_with_one_bit_turned_is_refused(name: str) -> None:
    data = PNGS[name]
    for place in range(PLACES):
        file = bytearray(data)
        file[len(data) * place // PLACES] ^= 1 << (place % 8)
        with pytest.raises(MmCacheError):
            decode_image(bytes(file), LIMITS)


def test_a_png_whose_end_is_missing_is_refused() -> None:
    """Its pixels are all there, but nothing says so."""
    data = PNGS["colour"]
    for cut in (5, 8, 12):
        with pytest.raises(InvalidImageError):
            decode_image(data[:-cut], LIMITS)


def test_what_follows_the_end_of_a_png_is_not_looked_at() -> None:
    data = PNGS["colour"]
    damaged = bytearray(png_chunk(b"tEXt", b"a\0b"))
    damaged[-1] ^= 1
    assert decode_image(data + damaged, LIMITS) == decode_image(data, LIMITS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_hole_in_another_format_is_an_error_of_ours_or_an_image_of_that_size(name: str) -> None:
    decoded = 0
    for length in (1, 64, 1024):
        for file in with_holes(OTHERS[name], length):
            with contextlib.suppress(MmCacheError):
                decoded += decode_image(file, LIMITS).size == smooth.size
    assert decoded > 0, "then this format tells damage, and belongs above"
