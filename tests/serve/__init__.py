"""`serve` in parts; as a whole it is met in tests/e2e/test_launch.py."""
