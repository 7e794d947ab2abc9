"""The cache core."""
