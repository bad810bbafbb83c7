"""The tensors of synthetic Llama-shaped checkpoints, and temporary folders for them."""

import math
import pathlib
import shutil
import tempfile
import weakref
import zlib

import jax.numpy as jnp
import numpy as np

from benchmarks.run.cases import Case, NamedCase
from benchmarks.suites.adaptation.llama_weights import list_layer_shapes

SUITE = "checkpoints"
BFLOAT16 = jnp.dtype(jnp.bfloat16)
_ATTENTION = ("q", "k", "v", "o")
_BLOCK = 2**24  # random numbers, more than the largest matrix of a layer has
_SPREAD = 0.02  # standard deviation of the weights


class Workspace:
    """A temporary folder that is removed together with the last reference to it."""

    def __init__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="jlora-benchmark-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def clear(self, name):
        """Return the path of an output, after removing the output of an earlier run."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True)
        return path


class RandomBlock:
    """One block of normal numbers that every tensor is a slice of.

    To draw all numbers of a large checkpoint anew would take minutes.
    """

    def __init__(self):
        numbers = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
        self._wide = np.float32(_SPREAD) * numbers
        self._narrow = self._wide.astype(BFLOAT16)

    def make_weight(self, name, shape):
        """Return the bfloat16 tensor of a name."""
        return self._slice(self._narrow, name, shape)

    def make_numbers(self, name, shape):
        """Return a float32 array of a name."""
        return self._slice(self._wide, name, shape)

    def _slice(self, block, name, shape):
        size = math.prod(shape)
        if size > _BLOCK:
            return np.resize(block, shape)
        start = zlib.crc32(name.encode()) % (_BLOCK - size + 1)
        return block[start : start + size].reshape(shape)


def make_case(hidden, layers, rank, dtype, name=None):
    """Return the case of a Llama-shaped model; None: named by its sizes."""
    sizes = f"Llama-shaped, hidden {hidden}, {layers} layers, {7 * layers} matrices"
    fields = Case("llama", "all", rank, dtype=dtype, layers=layers)
    return NamedCase(name or f"{sizes}, rank {rank}, {dtype}", (hidden, hidden), fields)


def list_modules(hidden, layers):
    """Return {path of a module: (outputs, inputs)} of all layers."""
    modules = {}
    for layer in range(layers):
        for name, (inputs, outputs) in list_layer_shapes(hidden).items():
            part = "self_attn" if name in _ATTENTION else "mlp"
            modules[f"model.layers.{layer}.{part}.{name}_proj"] = outputs, inputs
    return modules


def list_tensors(hidden, layers, vocabulary=0):
    """Return {name of a tensor: shape}, with an embedding and a head if asked for."""
    table = {"model.embed_tokens.weight": (vocabulary, hidden)}
    head = {"lm_head.weight": (vocabulary, hidden)}
    modules = list_modules(hidden, layers)
    weights = {f"{path}.weight": shape for path, shape in modules.items()}
    return {**table, **weights, **head} if vocabulary else weights


def count_layers(num_bytes, hidden, vocabulary):
    """Return the layers of a bfloat16 checkpoint with at least this many bytes."""
    per_layer = count_bytes(list_tensors(hidden, 1))
    rest = num_bytes - 2 * 2 * vocabulary * hidden
    return max(1, math.ceil(rest / per_layer))


def count_bytes(shapes):
    """Return the bytes of bfloat16 tensors."""
    return sum(BFLOAT16.itemsize * math.prod(shape) for shape in shapes.values())
