"""As in the real package: internals of the PyTorch backend."""
