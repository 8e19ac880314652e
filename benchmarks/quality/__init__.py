"""Which initialisation, which optimizer helps on a real task? `python -m benchmarks.quality`: see `__main__`."""
