"""Products of their own that tests and benchmarks use; nothing here is installed."""
