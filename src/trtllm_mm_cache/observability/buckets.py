"""Bounds of the histograms: few, because each costs a time series in every worker and label value."""

from __future__ import annotations

STEP_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""A step in the way of an image: from a key of a small file to the deadline of a fetch."""

FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
"""Time to first token: from a cached image on a fast GPU to a queue that is too long."""

BATCH_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Images in one run of the vision tower."""
