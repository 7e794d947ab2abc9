"""What can only be seen on a GPU, in one command: see `__main__`."""
