"""Bytes to a validated image: header first, pixels only when the header is within the limits.

Only the plugin that the file's own signature names is tried, and it is called directly: Pillow's
general `Image.open` tries plugins in turn, applies limits that are global to the process and reports
through warnings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from blake3 import blake3
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from trtllm_mm_cache.errors import InvalidImageError, MediaTooLargeError, MmCacheError, UnsupportedMediaError
from trtllm_mm_cache.media.image_limits import (
    BudgetedBytes,
    check_jpeg_scans,
    check_png_profiles,
    check_size,
    check_webp_canvas,
)
from trtllm_mm_cache.media.transparency import Colour, opaque, transparent_key
from trtllm_mm_cache.settings import ImageFormat, ImageLimits

_PIXELS_VERSION = 1
"""Raise it when `decode_image` makes other pixels of a file: old and new workers then share no keys."""

_PLUGINS: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

_SIGNATURES: tuple[tuple[bytes, ImageFormat], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)

_TIFF_COMPRESSIONS = {
    "raw",
    "packbits",
    "tiff_ccitt",
    "group3",
    "group4",
    "tiff_lzw",
    "tiff_deflate",
    "tiff_adobe_deflate",
}
"""Those whose cost is linear in the pixels. JPEG and WebP inside TIFF would need the checks that the
formats themselves get, for every strip."""


Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageInfo:
    """What an image's header says. Width and height as stored, before any EXIF orientation."""

    format: ImageFormat
    width: int
    height: int


def probe_image(data: bytes, limits: ImageLimits) -> ImageInfo:
    """Read an image's header and check it against the limits, without decoding pixels.

    Blocking: microseconds for honest files, up to about half a second for hostile ones, so servers run
    it in a thread as well; thread-safe. Raises `UnsupportedMediaError` for anything but the accepted
    formats, `MediaTooLargeError` beyond the pixel limits, `InvalidImageError` for a broken header.
    What lies behind the header can still be broken: only `decode_image` tells.
    """
    image_format, image = _open(data, limits)
    width, height = image.size
    return ImageInfo(format=image_format, width=width, height=height)


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode an image completely, to upright 8-bit RGB without metadata.

    The EXIF orientation is applied, then transparent pixels are laid on `limits.background`, whatever the
    format and mode. Of an animation or a file of several pages the first counts. Pixel for pixel what
    Hugging Face's `transformers.image_utils.load_image` gives where nothing is transparent, and everywhere
    when the background is None, with one exception: `load_image` clips 16-bit grey, which turns nearly all
    of it white; here its high byte counts, as it does in 16-bit colour.

    Blocking: run it in a thread; thread-safe. Takes up to 12 bytes a pixel while it runs. Raises what
    `probe_image` raises, and `InvalidImageError` for data that is broken or ends early. Damage in the middle
    is noticed as far as the format tells it: always in a PNG, which has checksums, seldom in a JPEG.
    """
    image_format, image = _open(data, limits)
    if image_format == "PNG":
        _guarded(lambda: _check_png_checksums(data))
    return _guarded(lambda: _upright_rgb(image, limits.background))


def pixels_fingerprint(fingerprint: str, limits: ImageLimits) -> str:
    """Return 64 hex digits for an encoder's `fingerprint` and all that decides what pixels it gets of a file.

    Workers whose `decode_image` gives the same file other pixels have another one: they share no keys.
    """
    return blake3(f"{fingerprint} pixels {_PIXELS_VERSION} {limits.background}".encode()).hexdigest()


def _open(data: bytes, limits: ImageLimits) -> tuple[ImageFormat, ImageFile.ImageFile]:
    """Return the format and the image with its header read, its file ready for the pixels."""
    if not data:
        raise InvalidImageError("the image is empty")
    if len(data) > limits.max_file_bytes:
        raise MediaTooLargeError(
            f"the image has {len(data)} bytes, more than the limit of {limits.max_file_bytes}; "
            "use a smaller one"
        )
    image_format = _format_of(data)
    if image_format is None or image_format not in limits.formats:
        accepted = ", ".join(sorted(limits.formats))
        raise UnsupportedMediaError(f"the media is not an image in an accepted format ({accepted})")
    if image_format == "WEBP":
        check_webp_canvas(data, limits)
    elif image_format == "JPEG":
        check_jpeg_scans(data)
    elif image_format == "PNG":
        check_png_profiles(data)
    file = BudgetedBytes(data, whole=image_format == "WEBP")
    image = _guarded(lambda: _PLUGINS[image_format](file))
    check_size(image.size, limits)
    if image_format == "TIFF" and image.info.get("compression") not in _TIFF_COMPRESSIONS:
        raise UnsupportedMediaError("the TIFF's compression is not accepted; use LZW or deflate")
    file.allow_pixels()
    return image_format, image


def _format_of(data: bytes) -> ImageFormat | None:
    for signature, image_format in _SIGNATURES:
        if data.startswith(signature):
            return image_format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _check_png_checksums(data: bytes) -> None:
    """Raise whatever Pillow raises unless every chunk up to the end of the image is there and undamaged.

    Decoding looks at no checksum of the pixels' chunks, and zlib notices damage only where it makes nonsense.
    """
    file = BudgetedBytes(data)
    file.allow_pixels()
    PngImagePlugin.PngImageFile(file).verify()


def _upright_rgb(image: ImageFile.ImageFile, background: Colour | None) -> Image.Image:
    key = transparent_key(image)
    image.load()
    image.getexif()  # the image keeps what it reads here, also when its metadata goes
    # Metadata would only mislead from here on: an orientation that is applied already, a transparent
    # colour that the result does not have. And `exif_transpose` would write what there is of it anew
    # without the orientation: gigabytes, where thousands of tags claim the same megabyte.
    image.info.clear()
    ImageOps.exif_transpose(image, in_place=True)
    return opaque(image, key, background)


def _guarded(work: Callable[[], Result]) -> Result:
    """Run decoder code; whatever it raises becomes an error of ours that shows none of its insides."""
    try:
        return work()
    except MmCacheError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaTooLargeError("the image has more pixels than the decoder accepts") from error
    except Exception as error:
        # Decoders answer hostile bytes with nearly every built-in exception there is.
        raise InvalidImageError("the image is broken or ends early") from error
