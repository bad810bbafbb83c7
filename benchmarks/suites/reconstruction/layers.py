"""The arrays of one layer, and the rows of a result that are checked."""

import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

SUITE = "reconstruction"
SCALE = 0.5  # a delta of 5 % of the base: feeding a result back in keeps it finite
_NUM_ROWS_CHECKED = 64


class Layer(NamedTuple):
    """NumPy arrays of one layer, in the dtype of its case."""

    w: np.ndarray  # [m, n]
    u: np.ndarray  # [m, r]
    v: np.ndarray  # [r, n]
    x: np.ndarray  # [t, m], activations
    dy: np.ndarray  # [t, n], the cotangent of the output


def make_layer(case):
    """Return the random `Layer` of a case. u @ v is a tenth of w in norm."""
    m, n = case.shape
    draw = make_sampler(case)
    return Layer(
        w=draw(m, n, scale=m**-0.5),
        u=draw(m, case.rank, scale=m**-0.5),
        v=draw(case.rank, n, scale=0.1 * case.rank**-0.5),
        x=draw(case.tokens, m, scale=1),
        dy=draw(case.tokens, n, scale=1),
    )


def make_sampler(case, rng=None):
    """Return draw(*shape, scale=...): normal values in the dtype of a case."""
    rng = make_generator(case) if rng is None else rng

    def draw(*shape, scale):
        values = rng.standard_normal(shape, np.float32) * np.float32(scale)
        return values.astype(jnp.dtype(case.dtype))

    return draw


def make_generator(case):
    """Return NumPy's random generator, seeded by the name of a case."""
    return np.random.default_rng(zlib.crc32(case.name.encode()))


def choose_rows(found):
    """Return indices of evenly spaced rows of a result, first and last included.

    To check all rows in float64 would take longer than the runs.
    """
    return np.unique(np.linspace(0, len(found) - 1, _NUM_ROWS_CHECKED).astype(int))
