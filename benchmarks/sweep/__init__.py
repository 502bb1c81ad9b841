"""What `python -m benchmarks compare` and `transfer` share, and each one's search."""
