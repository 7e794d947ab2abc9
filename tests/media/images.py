"""Image files made on the spot: honest ones, and ones whose headers lie."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from trtllm_mm_cache.settings import ImageLimits

LIMITS = ImageLimits()


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23), seed: int = 0) -> Image.Image:
    """A image whose every pixel differs from its neighbours, so that a shift or a mix-up shows."""
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 256 + noise[..., 1])
    if mode == "CMYK":
        return Image.frombytes("CMYK", size, noise.tobytes())
    rgba = Image.fromarray(noise)
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def animated(image_format: str, **options: Any) -> bytes:
    first, *others = [noise(size=(20, 10), seed=seed) for seed in range(4)]
    if image_format == "GIF":
        first, *others = [each.convert("P") for each in (first, *others)]
    return saved(first, image_format, save_all=True, append_images=others, duration=50, **options)


def frames(data: bytes) -> list[Image.Image]:
    with Image.open(io.BytesIO(data)) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def many_frames(image_format: str, count: int) -> bytes:
    """An animation or a file of many pages; only its first image counts."""
    first, *others = [Image.new("RGB", (9, 7), (n % 256, 255 - n % 256, 90)) for n in range(count)]
    return saved(first, image_format, save_all=True, append_images=others)


def png_of_16_bits(size: tuple[int, int], *, alpha: bool = False) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads and cannot write."""
    channels = 4 if alpha else 3
    values = np.random.default_rng(7).integers(0, 65536, (size[1], size[0] * channels), dtype=np.uint16)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return png(*size, png_chunk(b"IDAT", zlib.compress(lines)), colour=6 if alpha else 2, depth=16)


# Headers that lie.


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, colour: int = 2, depth: int = 8) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND")


def png_bomb(width: int, height: int) -> bytes:
    """A valid start of `width` x `height` black pixels in a few kilobytes."""
    return png(width, height, png_chunk(b"IDAT", zlib.compress(bytes(1_000_000), 9)))


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size than it has."""
    data = saved(noise(size=(16, 16)), "JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def gif_of_size(width: int, height: int, *, frame: bool = False) -> bytes:
    """A GIF whose screen, or only whose first frame, says another size than it has."""
    data = bytearray(saved(noise("P", (16, 16)), "GIF"))
    at = data.index(b"\x2c", 13) + 5 if frame else 6
    data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def gif_with(extensions: bytes) -> bytes:
    """A GIF with more blocks between its palette and its image."""
    data = saved(noise("P", (8, 8)), "GIF")
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:at] + extensions + data[at:]


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP header with that canvas, around an honest small image."""
    inner = saved(noise(size=(16, 16)), "WEBP")[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
    body = b"WEBP" + extended + (height - 1).to_bytes(3, "little") + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless_size(width: int, height: int) -> bytes:
    data = bytearray(saved(noise(size=(16, 16)), "WEBP", lossless=True))
    bits = int.from_bytes(data[21:25], "little") & ~0xFFFFFFF
    data[21:25] = (bits | (width - 1) | ((height - 1) << 14)).to_bytes(4, "little")
    return bytes(data)


def bmp_of_size(width: int, height: int) -> bytes:
    data = bytearray(saved(noise(size=(16, 16)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def bmp_of_runs(width: int, height: int) -> bytes:
    """A run-length coded BMP in which every run is one pixel long."""
    runs = b"\x01\x00" * (width * height) + b"\x00\x01"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + info + bytes(1024) + runs


def tiff(*tags: tuple[int, int, int, int], body: bytes = b"") -> bytes:
    """A little-endian TIFF of the given (tag, type, count, value) with `body` behind its directory."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + body


def tiff_of_size(width: int, height: int, compression: int = 1) -> bytes:
    return tiff(
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 200),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, 1000),
        body=bytes(2000),
    )


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*segments: bytes) -> bytes:
    data = saved(noise(size=(16, 16)), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_of_scans(extra: int, side: int = 1000) -> bytes:
    """A progressive JPEG whose last scan stands in it `extra` more times: some 100 bytes each."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * extra + data[-2:]


def exif_of_tags(count: int, size: int) -> bytes:
    """EXIF of `count` tags that each claim the same `size` bytes as their value."""
    start = 8 + 2 + 12 * count + 4
    entries = b"".join(struct.pack("<HHII", 0x4000 + each, 7, size, start) for each in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4) + bytes(size)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()
