"""The figures that the project aims at, each with its bound, met or missed.

target           `Target`, and the worst value over several cases
measures         how a figure is read from records: times, ratios, errors
evaluation       all targets in order, and one line of text for each
package          import time, demonstration, whole runs
factorization    truncated SVD: time, error, memory, compile time
updates          recompression, combination, low-rank terms, rank budgets
reconstruction   merges, adapted layers, roundings
adaptation       whole models and training steps
checkpoints      jobs from files to files: time, error, peak memory
quantization     bits, and the time and memory of a layer
training         a step of training: time, flops, memory; the overhead of the loop
"""

from benchmarks.report.targets.evaluation import evaluate_targets, list_targets
from benchmarks.report.targets.factorization import SVD_CASES
from benchmarks.report.targets.target import Target, Worst

__all__ = ["SVD_CASES", "Target", "Worst", "evaluate_targets", "list_targets"]
