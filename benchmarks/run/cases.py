"""Named cases: layer shapes of known models × dtype × rank × spectrum."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.run.matrices import make_matrix

# Rows are inputs, columns are outputs, as in the JAX kernel x @ w.
MODEL_SHAPES = {
    "llama-2-7b": {
        "attention": (4096, 4096),
        "mlp up": (4096, 11008),
        "mlp down": (11008, 4096),
    },
    "llama-3-8b": {
        "attention": (4096, 4096),
        "key value": (4096, 1024),
        "mlp up": (4096, 14336),
        "mlp down": (14336, 4096),
    },
    "llama-3.2-1b": {
        "attention": (2048, 2048),
        "mlp up": (2048, 8192),
        "mlp down": (8192, 2048),
    },
    "gpt-2": {
        "attention": (768, 2304),
        "output": (768, 768),
        "mlp up": (768, 3072),
        "mlp down": (3072, 768),
    },
    "gpt-2-medium": {"output": (1024, 1024)},
    "bert-base": {
        "attention": (768, 768),
        "mlp up": (768, 3072),
        "mlp down": (3072, 768),
    },
    "minilm-l6": {
        "attention": (384, 384),
        "mlp up": (384, 1536),
        "mlp down": (1536, 384),
    },
}


class Case(NamedTuple):
    """One problem. `layers` matrices [m, n], or one without a batch axis where it is 0."""

    model: str
    layer: str
    rank: int
    spectrum: str = "spiked"  # a name of benchmarks.matrices.SPECTRA, or "pretrained"
    dtype: str = "float32"
    layers: int = 0
    tokens: int = 0  # rows of activations, where the operation has them

    @property
    def shape(self):
        """(m, n) of one matrix."""
        return MODEL_SHAPES[self.model][self.layer]

    @property
    def name(self):
        m, n = self.shape
        batch = f"{self.layers}×" if self.layers else ""
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        return (
            f"{batch}{m}×{n}, rank {self.rank}, {self.spectrum}, {self.dtype}{tokens}"
        )

    def describe(self):
        """Return the fields of a record's case."""
        m, n = self.shape
        return {**self._asdict(), "name": self.name, "m": m, "n": n}


class NamedCase(NamedTuple):
    """A problem that is not one matrix of a known model, with the interface of a Case."""

    name: str
    shape: tuple[int, int]  # (m, n), or of the square projections of a whole model
    fields: Case

    @property
    def dtype(self):
        return self.fields.dtype

    def describe(self):
        """Return the fields of a record's case."""
        m, n = self.shape
        return {**self.fields._asdict(), "name": self.name, "m": m, "n": n}


class WholeCase(NamedTuple):
    """Something that has no matrix, with the interface of a Case."""

    name: str
    dtype: str = "float32"

    def describe(self):
        """Return the fields of a record's case."""
        return {
            **Case("none", "none", 0, "none")._asdict(),
            "name": self.name,
            "m": 0,
            "n": 0,
        }


def make_weights(case):
    """Return the matrix or the stack of matrices of a case, a NumPy array of its dtype."""
    if case.spectrum == "pretrained":
        # Read only when asked for: the weights are an optional package.
        from benchmarks.models.minilm import load_pretrained_matrices

        stack = load_pretrained_matrices(case.layer)[: case.layers or 1]
    else:
        layers = range(case.layers or 1)
        stack = np.stack(
            [make_matrix(case.spectrum, *case.shape, layer) for layer in layers]
        )
    return (stack if case.layers else stack[0]).astype(jnp.dtype(case.dtype))
