"""`trtllm-mm-cache top`: a live view over the workers' metrics."""
