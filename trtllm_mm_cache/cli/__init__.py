"""The command line: `trtllm-mm-cache frontend|encode|pd|drop|top|ask|plan`."""
