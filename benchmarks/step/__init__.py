"""Whole training steps side by side; see `python -m benchmarks.step --help`."""
