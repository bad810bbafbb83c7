"""Named cases: layer shapes of known models × dtype × rank × spectrum."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.run.matrices import make_matrix

# (m, n) = (inputs, outputs), as in x @ w.
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
    """One problem: a matrix [m, n] of a known model, or a stack [layers, m, n]."""

    model: str
    layer: str
    rank: int
    spectrum: str = "spiked"  # a name of matrices.SPECTRA, or "pretrained"
    dtype: str = "float32"
    layers: int = 0  # 0: one matrix without a batch axis
    tokens: int = 0  # rows of activations; 0: the operation has none

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes (m, n) of one matrix."""
        return MODEL_SHAPES[self.model][self.layer]

    @property
    def name(self) -> str:
        """The name by which records and reports know this case."""
        m, n = self.shape
        batch = f"{self.layers}×" if self.layers else ""
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        fields = f"rank {self.rank}, {self.spectrum}, {self.dtype}"
        return f"{batch}{m}×{n}, {fields}{tokens}"

    def describe(self) -> dict:
        """Return the fields of a record's case."""
        m, n = self.shape
        return {**self._asdict(), "name": self.name, "m": m, "n": n}


class NamedCase(NamedTuple):
    """A problem with a name of its own, with the interface of a `Case`.

    It stands for more or other than one matrix of a known model.
    """

    name: str
    shape: tuple[int, int]  # (m, n); for a whole model, of its square projections
    fields: Case

    @property
    def dtype(self) -> str:
        return self.fields.dtype

    def describe(self) -> dict:
        """Return the fields of a record's case."""
        m, n = self.shape
        return {**self.fields._asdict(), "name": self.name, "m": m, "n": n}


class WholeCase(NamedTuple):
    """A problem without a matrix, with the interface of a `Case`."""

    name: str
    dtype: str = "float32"

    def describe(self) -> dict:
        """Return the fields of a record's case."""
        fields = Case("none", "none", 0, "none")._asdict()
        return {**fields, "name": self.name, "m": 0, "n": 0}


def make_weights(case: Case) -> np.ndarray:
    """Return the matrix [m, n] or the stack [layers, m, n] of a case, in its dtype."""
    num_matrices = case.layers or 1
    if case.spectrum == "pretrained":
        # Imported only here: the weights are an optional package.
        from benchmarks.models.minilm import load_pretrained_matrices

        stack = load_pretrained_matrices(case.layer)[:num_matrices]
    else:
        layers = range(num_matrices)
        stack = np.stack([make_matrix(case.spectrum, *case.shape, i) for i in layers])

    return (stack if case.layers else stack[0]).astype(jnp.dtype(case.dtype))
