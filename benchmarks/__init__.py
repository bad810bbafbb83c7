"""Timings of jlora, the error beside every time. Run with `python -m benchmarks`."""
