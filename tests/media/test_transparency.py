"""Transparent images: every way in which a format says so, on the background that the settings name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.media.images import LIMITS, exif, noise, png, png_chunk, saved, tiff
from trtllm_mm_cache.media import decode_image, pixels_fingerprint
from trtllm_mm_cache.settings import ImageLimits

WIDTH, HEIGHT = 24, 16
BACKGROUNDS = {"ffffff": (255, 255, 255), "000000": (0, 0, 0), "1E90ff": (0x1E, 0x90, 0xFF)}

Layers = tuple[np.ndarray, np.ndarray]
"""Colour `[h, w, 3]` and alpha `[h, w]` as a file has them, by the format's own definition."""


def values(channels: int, highest: int = 255, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, highest + 1, (HEIGHT, WIDTH, channels), dtype=np.uint16)


def grey(channel: np.ndarray) -> np.ndarray:
    return np.repeat(channel[..., None], 3, axis=2)


def png_of(samples: np.ndarray, depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG of `samples` `[h, w, channels]`, of any depth; Pillow writes only some."""
    rows = samples.reshape(HEIGHT, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        lines = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    return png(WIDTH, HEIGHT, *chunks, png_chunk(b"IDAT", data), colour=colour, depth=depth)


def transparent(*key: int) -> bytes:
    return png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))


def alpha_of_key(samples: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    return np.where((samples == np.array(key)).all(axis=2), 0, 255)


def png_with_alpha(depth: int, channels: int) -> tuple[bytes, Layers]:
    samples = values(channels, 2**depth - 1)
    shown = samples >> (depth - 8)
    colour = grey(shown[..., 0]) if channels == 2 else shown[..., :3]
    return png_of(samples, depth, 4 if channels == 2 else 6), (colour, shown[..., -1])


def png_with_grey_key(depth: int) -> tuple[bytes, Layers]:
    samples = values(1, 2**depth - 1)
    key = int(samples[2, 5, 0])
    shown = samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))
    data = png_of(samples, depth, 0, transparent(key))
    return data, (grey(shown[..., 0]), alpha_of_key(samples, (key,)))


def png_with_colour_key(depth: int) -> tuple[bytes, Layers]:
    samples = values(3, 2**depth - 1)
    samples[::3] = samples[2, 5]
    key = tuple(int(each) for each in samples[0, 0])
    data = png_of(samples, depth, 2, transparent(*key))
    return data, (samples >> (depth - 8), alpha_of_key(samples, key))


def png_with_palette(depth: int, alphas: bytes) -> tuple[bytes, Layers]:
    samples = values(1, 2**depth - 1)
    palette = np.random.default_rng(5).integers(0, 256, (2**depth, 3), dtype=np.uint8)
    chunks = (png_chunk(b"PLTE", palette.tobytes()), png_chunk(b"tRNS", alphas))
    opacity = np.frombuffer(alphas.ljust(256, b"\xff"), np.uint8)
    return png_of(samples, depth, 3, *chunks), (palette[samples[..., 0]], opacity[samples[..., 0]])


def by_pillow(image: Image.Image, image_format: str, **options: object) -> tuple[bytes, Layers]:
    """A file without loss: its layers are those of the image that was saved."""
    layers = np.asarray(image.convert("RGBA"))
    return saved(image, image_format, **options), (layers[..., :3], layers[..., 3])


def rgba() -> Image.Image:
    return noise("RGBA", (WIDTH, HEIGHT))


def gif() -> tuple[bytes, Layers]:
    image = noise("P", (WIDTH, HEIGHT))
    index = int(np.asarray(image)[2, 5])
    data = saved(image, "GIF", transparency=index, optimize=False)
    alpha = np.where(np.asarray(image) == index, 0, 255)
    return data, (np.asarray(image.convert("RGB")), alpha)


def grey_gif() -> tuple[bytes, Layers]:
    """Pillow reads a GIF whose palette is grey as grey, with a key colour."""
    image = noise("L", (WIDTH, HEIGHT))
    key = int(np.asarray(image)[2, 5])
    data = saved(image, "GIF", transparency=key, optimize=False)
    return data, (grey(np.asarray(image)), np.where(np.asarray(image) == key, 0, 255))


def premultiplied_tiff() -> tuple[bytes, Layers]:
    """Pixels whole or not there, since what was multiplied by another alpha does not come back exactly."""
    pixels = values(4).astype(np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, 255)
    pixels[pixels[..., 3] == 0] = 0
    start = 8 + 2 + 12 * 10 + 4
    multiplied_already = 1
    fields = {256: WIDTH, 257: HEIGHT, 259: 1, 262: 2, 273: start + 8, 277: 4, 278: HEIGHT}
    short = [(tag, 3, 1, value) for tag, value in (fields | {338: multiplied_already}).items()]
    tags = (*short, (258, 3, 4, start), (279, 4, 1, pixels.size))
    return tiff(*tags, body=struct.pack("<4H", 8, 8, 8, 8) + pixels.tobytes()), (
        pixels[..., :3],
        pixels[..., 3],
    )


def bmp() -> tuple[bytes, Layers]:
    """A BMP whose header has a mask for alpha; without one the fourth byte means nothing."""
    pixels = values(4).astype(np.uint8)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = (
        struct.pack("<IiiHHIIiiII", 108, WIDTH, -HEIGHT, 1, 32, 3, pixels.size, 0, 0, 0, 0)
        + masks
        + bytes(52)
    )
    start = 14 + len(info)
    header = b"BM" + struct.pack("<IHHI", start + pixels.size, 0, 0, start)
    return header + info + pixels[..., (2, 1, 0, 3)].tobytes(), (pixels[..., :3], pixels[..., 3])


FILES: dict[str, Callable[[], tuple[bytes, Layers]]] = {
    "png rgba": lambda: png_with_alpha(8, 4),
    "png rgba, 16 bit": lambda: png_with_alpha(16, 4),
    "png grey and alpha": lambda: png_with_alpha(8, 2),
    "png grey and alpha, 16 bit": lambda: png_with_alpha(16, 2),
    **{f"png grey key, {depth} bit": partial(png_with_grey_key, depth) for depth in (1, 2, 4, 8, 16)},
    "png colour key": lambda: png_with_colour_key(8),
    "png colour key, 16 bit": lambda: png_with_colour_key(16),
    "png palette, one transparent": lambda: png_with_palette(8, b"\xff" * 7 + b"\0"),
    "png palette, all transparent": lambda: png_with_palette(8, bytes(256)),
    "png palette, alphas": lambda: png_with_palette(8, bytes(range(256))),
    "png palette, alphas, 4 bit": lambda: png_with_palette(4, bytes(range(0, 160, 16))),
    "png palette, one transparent, 1 bit": lambda: png_with_palette(1, b"\0"),
    "webp lossless": lambda: by_pillow(rgba(), "WEBP", lossless=True, exact=True),
    "gif": gif,
    "gif of greys": grey_gif,
    "tiff rgba": lambda: by_pillow(rgba(), "TIFF", compression="tiff_lzw"),
    "tiff grey and alpha": lambda: by_pillow(rgba().convert("LA"), "TIFF"),
    "tiff premultiplied": premultiplied_tiff,
    "bmp with an alpha mask": bmp,
}


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("name", FILES)
def test_transparent_pixels_show_the_background(name: str, background: str) -> None:
    data, (colour, alpha) = FILES[name]()
    assert (alpha == 0).any()
    share = alpha[..., None] / 255
    expected = colour * share + np.array(BACKGROUNDS[background]) * (1 - share)
    decoded = np.asarray(decode_image(data, ImageLimits(transparent_background=background)))
    assert np.abs(decoded - expected).max() <= 1
    whole = (alpha == 0) | (alpha == 255)
    assert np.array_equal(decoded[whole], expected[whole])


@pytest.mark.parametrize("name", FILES)
def test_without_a_background_a_transparent_pixel_has_its_own_colour(name: str) -> None:
    data, (colour, _) = FILES[name]()
    decoded = decode_image(data, ImageLimits(transparent_background="none"))
    assert np.array_equal(np.asarray(decoded), colour)


def test_white_is_the_default() -> None:
    data, _ = png_with_alpha(8, 4)
    assert decode_image(data, LIMITS) == decode_image(data, ImageLimits(transparent_background="FFFFFF"))


def test_an_opaque_image_is_the_same_on_every_background() -> None:
    image = noise("RGBA", (WIDTH, HEIGHT))
    image.putalpha(255)
    for data in (saved(image, "PNG"), saved(image.convert("P"), "PNG"), saved(image.convert("RGB"), "JPEG")):
        decoded = [decode_image(data, ImageLimits(transparent_background=name)) for name in BACKGROUNDS]
        assert decoded[0] == decoded[1] == decoded[2]


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_transparency_turns_with_the_image(mode: str, orientation: int) -> None:
    image = noise(mode, (WIDTH, HEIGHT))
    keys: dict[str, Any] = {"P": 7, "RGB": image.getpixel((5, 2))}
    key = {"transparency": keys[mode]} if mode in keys else {}
    plain = decode_image(saved(image, "PNG", **key), LIMITS)
    turned = decode_image(saved(image, "PNG", exif=exif(orientation), **key), LIMITS)
    assert {3: plain.rotate(180), 6: plain.rotate(-90, expand=True), 8: plain.rotate(90, expand=True)}[
        orientation
    ] == turned


def test_no_two_backgrounds_share_a_fingerprint() -> None:
    """Keys hold it, and workers compare it: on another background an image is another one."""
    backgrounds = ["ffffff", "FFFFFF", "fffffe", "000000", "none"]
    prints = [pixels_fingerprint("ab" * 32, ImageLimits(transparent_background=each)) for each in backgrounds]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
    assert all(len(bytes.fromhex(each)) == 32 for each in prints)
    assert "ab" * 32 not in prints
    assert pixels_fingerprint("cd" * 32, LIMITS) not in prints
