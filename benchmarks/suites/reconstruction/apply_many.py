"""One batch whose rows use sixteen adapters, beside the base without adapters."""

import functools

import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch
from benchmarks.suites.reconstruction.layers import (
    SUITE,
    make_generator,
    make_sampler,
)

_NUM_ADAPTERS = 16
_NUM_ROWS_CHECKED = 32


def make_many_group(case):
    """Return the group of one batch, its adapters drawn at random row by row."""
    contenders = (
        Contender(
            "jlora apply_many",
            functools.partial(prepare_jax, _run_ours),
            "jlora",
            f"{_NUM_ADAPTERS} adapters, the form chosen by default",
        ),
        Contender(
            "jax base alone",
            functools.partial(prepare_jax, lambda x, w, *_: x @ w),
            setting="x @ w without adapters, its error that of leaving them out",
        ),
        Contender(
            "torch loop over adapters",
            functools.partial(prepare_torch, _run_torch),
            setting="x @ w, then the rows of each adapter picked out and added",
            requires=("torch",),
        ),
    )

    (m, n), tokens, rank = case.shape, case.tokens, case.rank
    num_values = tokens * (m + n) + m * n + _NUM_ADAPTERS * rank * (m + n)
    return Group(
        SUITE,
        "apply many",
        case,
        lambda: _make_inputs(case),
        contenders,
        _measure_errors,
        precision="default",
        flops=2.0 * tokens * (m * n + rank * (m + n)),
        bytes=float(jnp.dtype(case.dtype).itemsize * num_values),
    )


def _make_inputs(case):
    """Return x [t, m], w [m, n], u [k, m, r], v [k, r, n], index [t] of k adapters."""
    (m, n), rank = case.shape, case.rank
    rng = make_generator(case)
    draw = make_sampler(case, rng)

    # The index is drawn first: the seed then gives the arrays of earlier records.
    index = rng.integers(0, _NUM_ADAPTERS, case.tokens).astype(np.int32)
    return (
        draw(case.tokens, m, scale=1),
        draw(m, n, scale=m**-0.5),
        draw(_NUM_ADAPTERS, m, rank, scale=m**-0.5),
        draw(_NUM_ADAPTERS, rank, n, scale=0.1 * rank**-0.5),
        index,
    )


def _run_ours(x, w, u, v, index):
    return jlora.apply_many(x, jlora.Factors(u, v), index, w)


def _run_torch(x, w, u, v, index):
    y = x @ w
    for adapter in range(_NUM_ADAPTERS):
        rows = index == adapter
        y[rows] += (x[rows] @ u[adapter]) @ v[adapter]
    return y


def _measure_errors(inputs, y):
    *arrays, index = inputs
    x, w, u, v = (np.asarray(each, np.float64) for each in arrays)
    rows = np.unique(np.linspace(0, len(x) - 1, _NUM_ROWS_CHECKED).astype(int))

    expected = np.stack([x[i] @ w + (x[i] @ u[index[i]]) @ v[index[i]] for i in rows])
    error = np.linalg.norm(np.asarray(y, np.float64)[rows] - expected)
    return {"relative error": error / np.linalg.norm(expected)}
