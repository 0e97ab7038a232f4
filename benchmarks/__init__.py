"""Measurements behind the figures in the documentation; each is a command, ``python -m benchmarks.NAME``."""
