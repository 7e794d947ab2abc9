"""What Hugging Face's files and processors say of a model: shared by the engines that run it from them.

No engine runs here, and no weights are read.
"""
