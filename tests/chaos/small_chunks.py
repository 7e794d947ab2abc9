"""The command line with smaller chunks of a READ: `python -m tests.chaos.small_chunks BYTES ARGUMENT...`.

An embedding of the demo model is at most 2304 bytes, where a chunk has 8 MiB: without this no fault would
come between two chunks.
"""

from __future__ import annotations

import sys

from trtllm_mm_cache.cli.main import main
from trtllm_mm_cache.transfer import reads

if __name__ == "__main__":
    reads.CHUNK_BYTES = int(sys.argv.pop(1))
    main()
