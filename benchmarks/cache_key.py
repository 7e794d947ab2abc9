"""From an image's data: URL to its key, beside hashing the URL's text.

    python -m benchmarks.cache_key [--repeats 201]

The image is a JPEG of 284 KiB. In turn, medians in microseconds:

    key        decode the base64 and hash the image's bytes: what the PD worker does
    hash       hash those bytes alone
    URL text   BLAKE3 over the URL's text, which would be no key: two spellings of an image would differ

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import io

import blake3
import numpy as np
from PIL import Image

from benchmarks.measuring import finish, interleave, median_ratio, median_us, say
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.media.data_url import decode_data_url

JPEG_BYTES = 284 * 1024
FINGERPRINT = "ab" * 32


def jpeg() -> bytes:
    """Return a JPEG of exactly 284 KiB: noise, padded behind its end as cameras do."""
    noise = np.random.default_rng(1).integers(0, 256, (420, 420, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    body = buffer.getvalue()
    if len(body) > JPEG_BYTES:
        raise SystemExit(f"the image has {len(body)} bytes, more than {JPEG_BYTES}")
    return body + bytes(JPEG_BYTES - len(body))


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=201, help="rounds")
    repeats = parser.parse_args().repeats
    body = jpeg()
    url = "data:image/jpeg;base64," + base64.b64encode(body).decode()
    spent = interleave(
        {
            "key": lambda: embedding_key(
                content_digest(decode_data_url(url, 2**30)), fingerprint=FINGERPRINT
            ),
            "hash": lambda: embedding_key(content_digest(body), fingerprint=FINGERPRINT),
            "URL text": lambda: blake3.blake3(url.encode()).digest(),
        },
        repeats,
    )
    results = {
        "repeats": repeats,
        "jpeg_bytes": len(body),
        "us": {name: median_us(seconds) for name, seconds in spent.items()},
        "key_to_url_text": round(median_ratio(spent["key"], spent["URL text"]), 3),
    }
    say(str(results))
    finish("cache_key", results)


if __name__ == "__main__":
    main()
