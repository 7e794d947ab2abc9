"""The demo model: a tiny Qwen2-VL that answers questions about drawn cards truly.

`pictures` and `questions` need Pillow alone; the rest trains and scores the model.
"""
