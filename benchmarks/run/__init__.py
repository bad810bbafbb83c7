"""Runs groups of contenders and records their times and errors.

cases           named problems: layer shapes of known models × dtype × rank × spectrum
matrices        test matrices of named spectra
contenders      contenders, groups of contenders, and levels: the input of the harness
preparation     contenders made ready to run: JAX, torch, NumPy
harness         warm-up and interleaved timing of one group
outcomes        the record of one contender's times and errors
records         the schema of a record; reading and writing files of records
environment     the machine, versions and commit of a record
limits          the rates that this device reaches at most
svd_errors      the error of a truncated SVD against the optimum
ahead_of_time   programs compiled for an accelerator that this machine lacks
compiled        the group that compiles such a program
"""
