"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu --out DIR`; see `__main__`."""
