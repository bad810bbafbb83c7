"""w + scale * u @ v, of a whole weight or of some columns."""

import functools

import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch
from benchmarks.suites.reconstruction.layers import (
    SCALE,
    SUITE,
    choose_rows,
    make_layer,
)

_NUM_COLUMNS = 64


def make_reconstruct_group(case, *, donated):
    """Return the group of w + scale * u @ v, in the memory of w or in fresh memory."""

    def run_ours(w, u, v):
        return jlora.reconstruct(jlora.Factors(u, v), w, scale=SCALE, donate=donated)

    def run_plain(w, u, v):
        return w + SCALE * (u @ v)

    def run_torch(w, u, v):
        import torch

        add = w.addmm_ if donated else functools.partial(torch.addmm, w)
        return add(u, v, alpha=SCALE)

    memory = "in place, w donated" if donated else "into fresh memory"
    contenders = (
        Contender(
            "jlora reconstruct", _prepare_update(run_ours, donated), "jlora", memory
        ),
        Contender(
            "jax plain",
            _prepare_update(run_plain, donated),
            setting=f"w + s * (u @ v) in the dtype of w, {memory}",
        ),
        Contender(
            "torch addmm_" if donated else "torch addmm",
            functools.partial(prepare_torch, run_torch),
            setting="alpha = s, in the dtype of w",
            requires=("torch",),
        ),
    )

    return Group(
        SUITE,
        "reconstruct donated" if donated else "reconstruct",
        case,
        lambda: make_layer(case)[:3],
        contenders,
        measure_update,
        **_count_update(case, case.shape[1]),
    )


def make_columns_group(case):
    """Return the group that updates the last columns of a weight in place.

    v is zero in the other columns, so a full reconstruct must give the same result.
    """

    def make_inputs():
        w, u, v, *_ = make_layer(case)
        v[:, :-_NUM_COLUMNS] = 0
        return w, u, v

    def run_torch(w, u, v):
        w[:, -_NUM_COLUMNS:].addmm_(u, v[:, -_NUM_COLUMNS:], alpha=SCALE)
        return w

    contenders = (
        _make_columns(f"jlora {_NUM_COLUMNS} columns", _NUM_COLUMNS),
        _make_columns("jlora all columns", None),
        Contender(
            "torch addmm_ of a view",
            functools.partial(prepare_torch, run_torch),
            setting=f"w[:, -{_NUM_COLUMNS}:].addmm_, alpha = s",
            requires=("torch",),
        ),
    )

    return Group(
        SUITE,
        "reconstruct columns",
        case,
        make_inputs,
        contenders,
        measure_update,
        **_count_update(case, _NUM_COLUMNS),
    )


def _make_columns(name, columns):
    def run(w, u, v):
        factors = jlora.Factors(u, v)
        return jlora.reconstruct(factors, w, scale=SCALE, columns=columns, donate=True)

    setting = f"columns={columns}, w donated"
    return Contender(name, _prepare_update(run, donated=True), "jlora", setting)


def _prepare_update(function, donated):
    return functools.partial(prepare_jax, function, donate=(0,) if donated else ())


def _count_update(case, num_columns):
    """Return the least flops and bytes of an update to some columns."""
    m, _ = case.shape
    itemsize = jnp.dtype(case.dtype).itemsize
    num_values = 2 * m * num_columns + (m + num_columns) * case.rank
    return {
        "flops": 2.0 * m * num_columns * case.rank,
        "bytes": float(itemsize * num_values),
    }


def measure_update(inputs, found):
    """Return the errors of w + scale * u @ v on evenly spaced rows.

    relative error: ‖found − exact‖_F / ‖exact‖_F.
    error of the delta: the same over ‖scale * u @ v‖_F, which is the part of the update
        that storing the sum loses.
    """
    rows = choose_rows(found)
    w, u, v = inputs
    w, u, v = (np.asarray(x, np.float64) for x in (w[rows], u[rows], v))

    delta = SCALE * u @ v
    error = np.linalg.norm(np.asarray(found[rows], np.float64) - w - delta)
    return {
        "relative error": error / np.linalg.norm(w + delta),
        "error of the delta": error / np.linalg.norm(delta),
    }
