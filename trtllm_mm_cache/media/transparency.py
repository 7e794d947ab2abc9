"""Transparent images to opaque ones, whichever way their format says that a pixel is transparent."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile

Colour = tuple[int, int, int]
"""Red, green and blue, each from 0 to 255."""

_GREY_SCALES = {"L;2": 85, "L;4": 17}
"""Pillow spreads grey of 2 and 4 bits over 0 to 255, but leaves the transparent grey as the file has it."""


def transparent_key(image: ImageFile.ImageFile) -> object:
    """Return what an image that is not loaded yet says of its transparent colours, fit for the loaded image.

    None: nothing, or an alpha channel does. Of 16-bit colour Pillow keeps the high bytes, so colours that
    differ from the transparent one in their low bytes alone become transparent with it.
    """
    key = image.info.get("transparency")
    rawmode = image.tile[0].args if image.tile else None
    if isinstance(key, int) and isinstance(rawmode, str):
        return key * _GREY_SCALES.get(rawmode, 1)
    if isinstance(key, tuple) and rawmode == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


def opaque(image: Image.Image, key: object, background: Colour | None) -> Image.Image:
    """Return a loaded image as 8-bit RGB, its transparent pixels on `background`; None keeps their colour.

    `key` is what `transparent_key` returned. 16-bit grey keeps its high byte. Blocking; takes up to 9 bytes
    a pixel on top of the image's own. An image without transparency is the same on every background.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        rgb = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
        if key is not None and background is not None:
            rgb.paste(background, mask=Image.fromarray(np.where(grey == key, 255, 0).astype(np.uint8)))
        return rgb
    if key is not None and background is not None:
        image.info["transparency"] = key
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, background)
    rgb.paste(rgba, mask=rgba.getchannel("A"))
    return rgb
