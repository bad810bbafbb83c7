"""Forward and backward of an adapted layer whose base is quantised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.suites.quantization.formats import FORMATS, SUITE
from benchmarks.suites.reconstruction.layers import SCALE, choose_rows, make_layer
from jlora.quantization import quantize

FLOAT, QWIX = "jlora float32 base", "qwix nf4"
_LEAST_RUNS = 7  # the ratios need common rounds
_TILE = 64


def make_layer_group(case):
    """Return the group of one layer: its output, and the gradients of x, u and v."""
    ours = [
        Contender(
            name,
            functools.partial(_prepare_ours, format=format),
            "jlora",
            "jlora.apply_factors, and jax.vjp of it",
            least_runs=_LEAST_RUNS,
        )
        for name, format in [
            *((name_format(name), format) for name, format in FORMATS.items()),
            (FLOAT, None),
        ]
    ]
    qwix = Contender(
        QWIX,
        _prepare_qwix,
        setting="qwix.dot_general on a QArray, and the delta beside it",
        requires=("qwix",),
        least_runs=_LEAST_RUNS,
    )
    return Group(
        SUITE,
        "layer, forward and backward",
        case,
        lambda: make_layer(case),
        (*ours, qwix),
        _measure,
        flops=4 * case.tokens * case.shape[0] * case.shape[1],
        precision="default",
    )


def name_format(name):
    """Return the name of the contender with a base in a format."""
    return f"jlora {name} base"


def _prepare_ours(w, u, v, x, dy, format):
    base = jnp.asarray(w) if format is None else quantize(w, format)

    def run(base, u, v, x, dy):
        def layer(x, u, v):
            return jlora.apply_factors(x, jlora.Factors(u, v), base, scale=SCALE)

        y, pull = jax.vjp(layer, x, u, v)
        return y, pull(dy)

    return prepare_jax(run, base, u, v, x, dy)


def _prepare_qwix(w, u, v, x, dy):
    import qwix

    base = qwix.quantize(
        jnp.asarray(w), "nf4", channelwise_axes=[1], tiled_axes={0: _TILE}
    )
    numbers = (((1,), (0,)), ((), ()))

    def run(base, u, v, x, dy):
        def layer(x, u, v):
            return qwix.dot_general(x, base, numbers) + SCALE * (x @ u) @ v

        y, pull = jax.vjp(layer, x, u, v)
        return y, pull(dy)

    return prepare_jax(run, base, u, v, x, dy)


def _measure(inputs, found):
    """Return the errors that the quantised base makes, over some rows."""
    y, (dx, _, _) = found
    w, u, v, x, dy = (np.asarray(each, np.float64) for each in inputs)
    rows = choose_rows(y)
    delta = SCALE * u @ v
    exact_y, exact_dx = x[rows] @ (w + delta), dy[rows] @ (w + delta).T
    return {
        "relative error": _compare(y[rows], exact_y),
        "relative error of the gradient": _compare(dx[rows], exact_dx),
    }


def _compare(found, exact):
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
