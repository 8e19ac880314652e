"""Benchmarks and checks that are run by hand or by `make`; records are kept in `results/`."""
