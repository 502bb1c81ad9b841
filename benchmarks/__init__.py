"""Experiments with `unit_scale`: `python -m benchmarks --help`."""
