"""What an image may cost, checked before a decoder gets to spend it.

Pixels are only one way to be expensive. Each limit here stands for a file that was built and timed
against Pillow 13: parsers that loop in Python over millions of empty chunks or run quadratically over
metadata (seconds to minutes for a 50 MB file), a colour profile of a kilobyte that inflates to a
megabyte and stands in the file thousands of times, a progressive JPEG whose every 119 bytes make
libjpeg walk over the whole image once more (hours).
"""

from __future__ import annotations

import io
import re
import warnings

from trtllm_mm_cache.errors import InvalidImageError, MediaTooLargeError
from trtllm_mm_cache.settings import ImageLimits

# Pillow warns once for each broken tag, in words that differ; Python remembers every one of them. A
# file of broken tags would fill the log and, over time, the memory. What matters comes as an exception.
warnings.filterwarnings("ignore", module=r"PIL\.")

_HEADER_READS = 2048
_HEADER_BYTES = 8 * 1024**2
_DECODE_READS = 262_144
_JPEG_SCANS = 64
_JPEG_SEGMENTS = 4096
_PNG_PROFILES = 16

# Any marker but fill bytes, stuffed bytes and restarts: those stand inside a scan's data.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01

_TOO_MANY_PARTS = "the image is split into too many parts; save it anew"


class BudgetedBytes(io.BytesIO):
    """A file in memory that a decoder may read from so many times, and then no more.

    Pillow's parsers do a read for each chunk, segment or run, so counting reads bounds their loops,
    whatever the format. The budget for a header is 2048 reads and 8 MiB (a JPEG takes three reads
    for each 64 KiB of metadata); `allow_pixels` raises it to 262,144 reads in all, enough for a TIFF
    of 65,535 strips. With `whole` a single read may take everything, as WebP's does.
    """

    def __init__(self, data: bytes, *, whole: bool = False) -> None:
        super().__init__(data)
        self._reads_left = _HEADER_READS
        self._bytes_left = len(data) + _HEADER_BYTES if whole else _HEADER_BYTES

    def allow_pixels(self) -> None:
        """Grant what decoding the pixels takes on top of the header."""
        self._reads_left += _DECODE_READS - _HEADER_READS
        self._bytes_left = 2 * len(self.getbuffer()) + _HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does; raises `InvalidImageError` when the budget is spent."""
        piece = super().read(size)
        self._reads_left -= 1
        self._bytes_left -= len(piece)
        if self._reads_left < 0:
            raise InvalidImageError(_TOO_MANY_PARTS)
        if self._bytes_left < 0:
            raise InvalidImageError("the image has too much metadata; save it without")
        return piece


def check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raise `InvalidImageError` for an image without pixels, `MediaTooLargeError` for one with too many."""
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImageError("the image has no pixels")
    if max(width, height) > limits.max_side:
        raise MediaTooLargeError(
            f"the image is {width}x{height} pixels, a side longer than the limit of "
            f"{limits.max_side}; scale it down"
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise MediaTooLargeError(
            f"the image is {width}x{height} pixels, one side more than {limits.max_aspect_ratio:g} "
            "times the other; crop it"
        )
    if width * height > limits.max_pixels:
        raise MediaTooLargeError(
            f"the image is {width}x{height} pixels, more than the limit of "
            f"{limits.max_pixels} in all; scale it down"
        )


def check_webp_canvas(data: bytes, limits: ImageLimits) -> None:
    """Check an extended WebP's canvas: its decoder allocates the canvas as soon as it is opened."""
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        check_size((width, height), limits)


def check_jpeg_scans(data: bytes) -> None:
    """Raise `InvalidImageError` for a JPEG with more than 64 scans or 4096 segments.

    Encoders write some 10 scans where they write several, and a segment for each 64 KiB of metadata.

    Walks from marker to marker (ITU-T T.81, annex B) up to the end of the image, not into what trails
    it. About 2 GB/s.
    """
    segments, scans, position = 0, 0, 2
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            return
        segments += 1
        scans += marker == _START_OF_SCAN
        if segments > _JPEG_SEGMENTS:
            raise InvalidImageError(_TOO_MANY_PARTS)
        if scans > _JPEG_SCANS:
            raise InvalidImageError(f"the JPEG has more than {_JPEG_SCANS} scans; save it anew")
        if marker not in {_START_OF_IMAGE, _TEMPORARY}:
            position += int.from_bytes(data[position : position + 2], "big")


def check_png_profiles(data: bytes) -> None:
    """Raise `InvalidImageError` for a PNG with more than a few colour profiles; the format allows one.

    Counts their name wherever it stands, which is quick, and by chance does not happen so often.
    """
    if data.count(b"iCCP") > _PNG_PROFILES:
        raise InvalidImageError("the PNG has many colour profiles; save it anew")
