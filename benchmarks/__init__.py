"""What normalisation costs, against its peers: `python -m benchmarks`."""
