"""Pairs of checkpoints that differ by a known kind of change, and errors of adapters.

Every change is a bulk of noise and twelve directions above it, 1 % of the weight. The
stored weights are bfloat16, so their rounding is a part of the difference.
"""

import numpy as np

import jlora
from benchmarks.run.matrices import make_matrix
from benchmarks.run.preparation import use_all_threads
from benchmarks.run.svd_errors import compute_singular_values
from benchmarks.suites.adaptation.llama_weights import vary_matrix
from benchmarks.suites.checkpoints.synthetic import (
    BFLOAT16,
    RandomBlock,
    Workspace,
    list_modules,
    list_tensors,
)
from benchmarks.suites.checkpoints.written_files import write_checkpoint
from jlora.checkpoints import open_checkpoint

_CHANGE = 0.01  # the norm of a change over the norm of its weight


class CheckpointPair:
    """Two checkpoints on the disk, and the best energies of their differences.

    Attributes:
        workspace: The temporary folder that holds both.
        layers: Number of layers.
    """

    def __init__(self, workspace, hidden, layers):
        self.workspace, self.layers = workspace, layers
        self.base, self.tuned = (workspace.path / name for name in ("base", "tuned"))
        self._modules = list_modules(hidden, layers)
        self._energies = {}  # {path: squared singular values}, on demand

    def list_checked(self):
        """Return the modules of the first and the last layer."""
        checked = {f"model.layers.{layer}." for layer in (0, self.layers - 1)}
        return [path for path in self._modules if path.startswith(tuple(checked))]

    def read_difference(self, path):
        """Return the float32 difference [outputs, inputs] of a module."""
        both = (open_checkpoint(each) for each in (self.tuned, self.base))
        new, old = (each[f"{path}.weight"].astype(np.float32) for each in both)
        return new - old

    def find_best_energy(self, path, rank):
        """Return the largest energy that factors of a rank can capture."""
        if path not in self._energies:
            values = compute_singular_values(self.read_difference(path))
            self._energies[path] = values**2
        return np.sum(self._energies[path][:rank])


def make_pair(hidden, layers):
    """Return a `CheckpointPair` of a Llama-shaped model and its tuned copy."""
    workspace = Workspace()
    shapes, block = list_tensors(hidden, layers), RandomBlock()
    write_checkpoint(workspace.path / "base", shapes, block.make_weight)

    # One matrix for each shape; every module changes by another variation of it.
    rng = np.random.default_rng(0)
    changes = {shape: _make_change(shape) for shape in dict.fromkeys(shapes.values())}

    def make_tuned(name, shape):
        weight = block.make_weight(name, shape).astype(np.float32)
        scale = np.float32(_CHANGE * np.linalg.norm(weight))
        return (weight + scale * vary_matrix(rng, changes[shape])).astype(BFLOAT16)

    write_checkpoint(workspace.path / "tuned", shapes, make_tuned)
    return CheckpointPair(workspace, hidden, layers)


def _make_change(shape):
    """Return a float32 matrix of norm 1."""
    a = make_matrix("spiked", *shape)
    return (a / np.linalg.norm(a)).astype(np.float32)


def measure_shortfall(rank, inputs, adapter):
    """Return how much less energy an adapter captures than the best one, at worst."""
    (pair,) = inputs
    factors, _ = jlora.load_peft(adapter)

    shortfalls = []
    for path in pair.list_checked():
        captured = _measure_captured(pair.read_difference(path), *factors[path])
        shortfalls.append(1 - captured / pair.find_best_energy(path, rank))
    return {"energy shortfall": max(shortfalls), "modules": len(factors)}


def _measure_captured(difference, u, v):
    """Return ‖D‖² − ‖D − (u v)ᵀ‖² in float64."""
    d, u, v = (each.astype(np.float64) for each in (difference, u, v))
    with use_all_threads():
        residual = d - (u @ v).T
        return np.linalg.norm(d) ** 2 - np.linalg.norm(residual) ** 2
