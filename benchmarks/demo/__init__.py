"""The demo (`python -m benchmarks.demo`) and the studies of quality (`python -m benchmarks.demo.study`)."""
