"""The suites: problems, and everything that is timed on them.

factorization    truncated SVD of weights
updates          factors → factors: recompression, low-rank terms, rank budgets
reconstruction   factors → matrix, and factors → activations
adaptation       whole models: first factors and steps of training
checkpoints      jobs from files to files: extraction, merges, peak memory
training         a step of training, and the loop around it
quantization     bases of 4 and 8 bits: formats, layers, whole models
package          import time and the demonstration

Each package has `list_groups(level_name, platform)`. Records of different commits are
matched by the names of suite, operation, case and contender: they must not change.
"""

import importlib

SUITES = (
    "factorization",
    "updates",
    "reconstruction",
    "adaptation",
    "checkpoints",
    "training",
    "quantization",
    "package",
)


def list_suite(name, level_name, platform):
    """Return the groups of one suite for a level ("quick", "full") on a platform."""
    module = importlib.import_module(f"benchmarks.suites.{name}")
    return module.list_groups(level_name, platform)
