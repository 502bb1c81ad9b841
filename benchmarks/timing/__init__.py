"""What `python -m benchmarks speed` times, how, and what people see of it."""
