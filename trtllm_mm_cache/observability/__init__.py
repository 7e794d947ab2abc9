"""Metrics exposition and logging. Reads snapshots of the other parts; nothing depends on it to work."""
