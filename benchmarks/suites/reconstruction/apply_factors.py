"""One adapted layer, x @ w + scale * (x @ u) @ v, forward and backward."""

import functools

import jax
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


def make_apply_group(case):
    """Return the group of the output of one adapted layer."""
    contenders = (
        Contender(
            "jlora apply_factors",
            functools.partial(prepare_jax, _run_ours),
            "jlora",
            "products at JAX's default precision",
        ),
        Contender(
            "jax base alone",
            functools.partial(prepare_jax, _run_base),
            setting="x @ w without a delta, and judged without it",
        ),
        Contender(
            "torch LoRA",
            functools.partial(prepare_torch, _run_torch),
            setting="x @ w + ((x @ u) @ v) * s, torch's default precision",
            requires=("torch",),
        ),
    )

    (m, n), tokens, rank = case.shape, case.tokens, case.rank
    num_values = tokens * (m + n) + m * n + rank * (m + n)
    return Group(
        SUITE,
        "apply factors",
        case,
        lambda: _make_forward_inputs(case),
        contenders,
        measure_layer,
        precision="default",
        flops=2.0 * tokens * (m * n + rank * (m + n)),
        bytes=float(jnp.dtype(case.dtype).itemsize * num_values),
    )


def make_backward_group(case):
    """Return the group of one layer's output and its gradients to x, u and v."""
    contenders = (
        Contender(
            "jlora apply_factors",
            functools.partial(prepare_jax, _step_ours),
            "jlora",
            "output and gradients to x, u, v",
        ),
        Contender(
            "jax base forward and input gradient",
            functools.partial(prepare_jax, _step_base),
            setting="x @ w, gradient to x alone, judged as such",
        ),
        Contender(
            "jax full weight-gradient step",
            functools.partial(prepare_jax, _step_full),
            setting="x @ w, gradients to x and w, judged as such",
        ),
        Contender(
            "torch LoRA",
            functools.partial(prepare_torch, _step_torch),
            setting="autograd of x @ w + ((x @ u) @ v) * s, torch's default precision",
            requires=("torch",),
        ),
    )

    (m, n), tokens, rank = case.shape, case.tokens, case.rank
    num_values = 2 * tokens * (m + n) + m * n + 2 * rank * (m + n)
    return Group(
        SUITE,
        "apply factors backward",
        case,
        lambda: _make_backward_inputs(case),
        contenders,
        measure_layer,
        precision="default",
        flops=2.0 * tokens * (2 * m * n + 3 * rank * (m + n)),
        bytes=float(jnp.dtype(case.dtype).itemsize * num_values),
    )


def _make_forward_inputs(case):
    w, u, v, x, _ = make_layer(case)
    return x, w, u, v


def _make_backward_inputs(case):
    w, u, v, x, dy = make_layer(case)
    return x, w, u, v, dy


def _apply(x, w, u, v):
    return jlora.apply_factors(x, jlora.Factors(u, v), w, scale=SCALE)


def _run_ours(x, w, u, v):
    return {"y": _apply(x, w, u, v)}


def _run_base(x, w, u, v):
    return {"plain y": x @ w}


def _run_torch(x, w, u, v):
    return {"y": x @ w + ((x @ u) @ v) * SCALE}


def _step_ours(x, w, u, v, dy):
    y, pull_back = jax.vjp(lambda x, u, v: _apply(x, w, u, v), x, u, v)
    dx, du, dv = pull_back(dy)
    return {"y": y, "dx": dx, "du": du, "dv": dv}


def _step_base(x, w, u, v, dy):
    y, pull_back = jax.vjp(lambda x: x @ w, x)
    return {"plain y": y, "plain dx": pull_back(dy)[0]}


def _step_full(x, w, u, v, dy):
    y, pull_back = jax.vjp(jnp.matmul, x, w)
    dx, dw = pull_back(dy)
    return {"plain y": y, "plain dx": dx, "plain dw": dw}


def _step_torch(x, w, u, v, dy):
    import torch

    x, u, v = (each.detach().requires_grad_() for each in (x, u, v))
    y = _run_torch(x, w, u, v)["y"]
    dx, du, dv = torch.autograd.grad(y, (x, u, v), dy)
    return {"y": y, "dx": dx, "du": du, "dv": dv}


# Some rows of each array of a layer's step. Arrays without a delta are named "plain".
_EXPECTED = {
    "y": lambda rows, x, w, u, v, *_: x[rows] @ w + SCALE * (x[rows] @ u) @ v,
    "dx": lambda rows, x, w, u, v, dy: dy[rows] @ w.T + SCALE * (dy[rows] @ v.T) @ u.T,
    "du": lambda rows, x, w, u, v, dy: SCALE * x[:, rows].T @ (dy @ v.T),
    "dv": lambda rows, x, w, u, v, dy: SCALE * (x @ u[:, rows]).T @ dy,
    "plain y": lambda rows, x, w, *_: x[rows] @ w,
    "plain dx": lambda rows, x, w, u, v, dy: dy[rows] @ w.T,
    "plain dw": lambda rows, x, w, u, v, dy: x[:, rows].T @ dy,
}


def measure_layer(inputs, result):
    """Return the relative errors in Frobenius norm: the largest, then each."""
    exact = [np.asarray(x, np.float64) for x in inputs]
    errors = {}
    for name, found in result.items():
        rows = choose_rows(found)
        expected = _EXPECTED[name](rows, *exact)
        difference = np.linalg.norm(np.asarray(found[rows], np.float64) - expected)
        errors[f"relative error of {name}"] = difference / np.linalg.norm(expected)
    return {"relative error": max(errors.values()), **errors}
