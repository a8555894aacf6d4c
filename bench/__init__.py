"""Benchmarks of snapstore: named workloads behind ``python -m bench``, each beside its own limit and its peers."""
