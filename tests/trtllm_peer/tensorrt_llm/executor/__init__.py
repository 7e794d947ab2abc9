"""The engine's other process: `worker` is its main module, `process` this side of it."""
