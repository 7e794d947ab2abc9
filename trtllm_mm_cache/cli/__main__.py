"""`python -m trtllm_mm_cache.cli`, where the console script is not on the path."""

from trtllm_mm_cache.cli.main import main

main()
