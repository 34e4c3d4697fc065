"""Benchmarks: every way to run a layer on a mixed weight, timed side by side. ``python -m benchmarks --help``."""
