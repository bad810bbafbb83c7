"""The weights of a Llama-shaped model, as each library wants them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.matrices import make_matrix
from benchmarks.run.preparation import to_torch

SUITE = "adaptation"
# A layer of Llama has four square projections and the three matrices of a gated MLP.
_SQUARE, _UP, _DOWN = ("q", "k", "v", "o"), ("gate", "up"), ("down",)
WEIGHT_NAMES = (*_SQUARE, *_UP, *_DOWN)
# Deeper models repeat these layers: their weights together would fill the memory.
LAYERS_AT_ONCE = 8


class ModelWeights:
    """The weights of some layers, put on the device once for all contenders.

    Attributes:
        arrays: {path: NumPy [m, n]}.
        num_repeats: How often all of them are adapted, to stand for a deeper model.
    """

    def __init__(self, arrays, num_repeats):
        self.arrays, self.num_repeats = arrays, num_repeats

    @property
    def num_layers(self):
        return len(self.arrays) // len(WEIGHT_NAMES)

    @functools.cached_property
    def in_jax(self):
        """The weights as JAX arrays on the device."""
        return jax.block_until_ready(jax.device_put(self.arrays))

    @functools.cached_property
    def in_torch(self):
        """The weights as torch's layers hold them, contiguous [n, m]."""
        return {
            path: to_torch(np.ascontiguousarray(array.T))
            for path, array in self.arrays.items()
        }


def make_model(hidden, layers, dtype):
    """Return the `ModelWeights` of a Llama-shaped model.

    Only one spiked matrix is made for each shape. Every weight is a copy of it with the
    signs of its rows flipped and its columns permuted at random: the singular values
    are the same, the singular vectors are different, and the cost is one pass.
    """
    shapes = list_layer_shapes(hidden)
    bases = {
        shape: make_matrix("spiked", *shape).astype(jnp.dtype(dtype))
        for shape in dict.fromkeys(shapes.values())
    }

    rng = np.random.default_rng(0)
    arrays = {}
    for layer in range(min(layers, LAYERS_AT_ONCE)):
        for name, shape in shapes.items():
            arrays[f"layers/{layer}/{name}"] = vary_matrix(rng, bases[shape])
    return ModelWeights(arrays, count_repeats(layers))


def list_layer_shapes(hidden):
    """Return {name: (m, n)} of the weights of one layer."""
    wide = hidden * 43 // 16  # 11008 for 4096
    return {
        **dict.fromkeys(_SQUARE, (hidden, hidden)),
        **dict.fromkeys(_UP, (hidden, wide)),
        **dict.fromkeys(_DOWN, (wide, hidden)),
    }


def count_repeats(layers):
    """Return how often `LAYERS_AT_ONCE` layers are adapted for a model of `layers`."""
    return -(-layers // LAYERS_AT_ONCE)


def vary_matrix(rng, a):
    """Return a matrix of the same singular values and other singular vectors."""
    signs = rng.choice(np.array([-1, 1], a.dtype), (len(a), 1))
    return np.take(a, rng.permutation(a.shape[1]), axis=1) * signs
