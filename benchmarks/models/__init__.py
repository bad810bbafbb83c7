"""Known models as plain JAX functions of a tree of weights, for benchmarks and tests."""
