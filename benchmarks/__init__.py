"""Timings of jlora beside other libraries, with the error of every result.

Run with `python -m benchmarks`. Each folder holds one part:

run       the harness: cases, contenders, timing, and the records that a run writes
peers     other libraries' truncated SVDs
models    known models as plain JAX functions
suites    the problems to measure, one folder for each suite
report    tables, comparisons and targets, read from records
plots     figures, drawn from records
results   the records themselves, one folder for each kind of device
"""
