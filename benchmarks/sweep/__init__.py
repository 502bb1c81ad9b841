"""What `python -m benchmarks compare` does."""
