"""Benchmarks of what normalising costs, beside its peers: `python -m benchmarks`."""
