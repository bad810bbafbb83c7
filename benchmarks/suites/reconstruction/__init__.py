"""Factors → matrix, in place and not, and factors → activations with their gradients."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.cases import Case
from benchmarks.run.harness import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch
from benchmarks.suites.reconstruction import merging

SUITE = "reconstruction"
SCALE = 0.5  # a delta of 5 % of the base: runs that feed their result back stay finite
_NUM_COLUMNS = 64
_ROWS_CHECKED = 64


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    if level_name == "quick":
        weight, ranks = ("gpt-2-medium", "output"), (16, 64)
        layer = Case("bert-base", "attention", 16, "factors", tokens=128)
    else:
        weight, ranks = ("llama-2-7b", "attention"), (8, 16, 32, 64, 128)
        layer = Case("llama-3.2-1b", "attention", 16, "factors", tokens=512)
    groups = [
        make_reconstruct_group(Case(*weight, rank, "factors", dtype), donated=donated)
        for dtype in ("float32", "bfloat16")
        for rank in ranks
        for donated in (True, False)
    ]
    groups.append(make_columns_group(Case(*weight, 16, "factors")))
    groups += [make_apply_group(layer), make_backward_group(layer)]
    few = layer._replace(tokens=layer.tokens // 8)
    groups += [merging.make_many_group(SUITE, case) for case in (layer, few)]
    groups.append(merging.make_rounding_group(SUITE))
    if level_name == "full":
        groups += merging.list_compile_groups(SUITE)
    if level_name == "full" and platform == "gpu":
        decode, prefill = (
            Case(*weight, 16, "factors", "bfloat16", tokens=tokens)
            for tokens in (16, 4096)
        )
        groups += [make_apply_group(decode), make_apply_group(prefill)]
        groups.append(make_backward_group(prefill))
    return groups


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

    place = "in place, w donated" if donated else "into fresh memory"
    contenders = (
        Contender(
            "jlora reconstruct", _prepare_update(run_ours, donated), "jlora", place
        ),
        Contender(
            "jax plain",
            _prepare_update(run_plain, donated),
            setting=f"w + s * (u @ v) in the dtype of w, {place}",
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
        **_count_update(case, None),
    )


def make_columns_group(case):
    """Return the group that renews the last columns of a weight in place.

    v is zero elsewhere, so that a full reconstruct has to give the same.
    """

    def make_inputs():
        w, u, v, *_ = make_layer(case)
        v[:, :-_NUM_COLUMNS] = 0
        return w, u, v

    def run_ours(columns, w, u, v):
        return jlora.reconstruct(
            jlora.Factors(u, v), w, scale=SCALE, columns=columns, donate=True
        )

    def run_torch(w, u, v):
        w[:, -_NUM_COLUMNS:].addmm_(u, v[:, -_NUM_COLUMNS:], alpha=SCALE)
        return w

    ours = [
        Contender(
            f"jlora {words}",
            _prepare_update(functools.partial(run_ours, columns), True),
            "jlora",
            f"columns={columns}, w donated",
        )
        for words, columns in (
            (f"{_NUM_COLUMNS} columns", _NUM_COLUMNS),
            ("all columns", None),
        )
    ]
    peer = Contender(
        "torch addmm_ of a view",
        functools.partial(prepare_torch, run_torch),
        setting=f"w[:, -{_NUM_COLUMNS}:].addmm_, alpha = s",
        requires=("torch",),
    )
    return Group(
        SUITE,
        "reconstruct columns",
        case,
        make_inputs,
        (*ours, peer),
        measure_update,
        **_count_update(case, _NUM_COLUMNS),
    )


def _prepare_update(function, donated):
    return functools.partial(prepare_jax, function, donate=(0,) if donated else ())


def _count_update(case, columns):
    m, n = case.shape
    changed, itemsize = columns or n, jnp.dtype(case.dtype).itemsize
    return {
        "flops": 2.0 * m * changed * case.rank,
        "bytes": float(itemsize * (2 * m * changed + (m + changed) * case.rank)),
    }


def make_apply_group(case):
    """Return the group of x @ w + scale * (x @ u) @ v."""
    m, n = case.shape
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
    sizes = case.tokens * (m + n) + m * n + case.rank * (m + n)
    return Group(
        SUITE,
        "apply factors",
        case,
        lambda: _make_forward_inputs(case),
        contenders,
        measure_layer,
        precision="default",
        flops=2.0 * case.tokens * (m * n + case.rank * (m + n)),
        bytes=float(jnp.dtype(case.dtype).itemsize * sizes),
    )


def make_backward_group(case):
    """Return the group of one layer's step: its output and the gradients to x, u and v."""
    m, n = case.shape
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
    sizes = 2 * case.tokens * (m + n) + m * n + 2 * case.rank * (m + n)
    return Group(
        SUITE,
        "apply factors backward",
        case,
        lambda: _make_backward_inputs(case),
        contenders,
        measure_layer,
        precision="default",
        flops=2.0 * case.tokens * (2 * m * n + 3 * case.rank * (m + n)),
        bytes=float(jnp.dtype(case.dtype).itemsize * sizes),
    )


def _apply(x, w, u, v):
    return jlora.apply_factors(x, jlora.Factors(u, v), w, scale=SCALE)


def _run_ours(x, w, u, v):
    return {"y": _apply(x, w, u, v)}


def _run_base(x, w, u, v):
    return {"plain y": x @ w}


def _step_ours(x, w, u, v, dy):
    y, pull = jax.vjp(lambda x, u, v: _apply(x, w, u, v), x, u, v)
    return dict(zip(("y", "dx", "du", "dv"), (y, *pull(dy)), strict=True))


def _step_base(x, w, u, v, dy):
    y, pull = jax.vjp(lambda x: x @ w, x)
    return {"plain y": y, "plain dx": pull(dy)[0]}


def _step_full(x, w, u, v, dy):
    y, pull = jax.vjp(jnp.matmul, x, w)
    return dict(zip(("plain y", "plain dx", "plain dw"), (y, *pull(dy)), strict=True))


def _run_torch(x, w, u, v):
    return {"y": x @ w + ((x @ u) @ v) * SCALE}


def _step_torch(x, w, u, v, dy):
    import torch

    x, u, v = (part.detach().requires_grad_() for part in (x, u, v))
    y = _run_torch(x, w, u, v)["y"]
    gradients = torch.autograd.grad(y, (x, u, v), dy)
    return dict(zip(("y", "dx", "du", "dv"), (y, *gradients), strict=True))


def make_layer(case):
    """Return (w [m, n], u [m, r], v [r, n], x [t, m], dy [t, n]) in the dtype of the case.

    u @ v is a tenth of w in norm.
    """
    m, n = case.shape
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))

    def draw(rows, columns, scale):
        values = rng.standard_normal((rows, columns), np.float32) * np.float32(scale)
        return values.astype(jnp.dtype(case.dtype))

    return (
        draw(m, n, m**-0.5),
        draw(m, case.rank, m**-0.5),
        draw(case.rank, n, 0.1 * case.rank**-0.5),
        draw(case.tokens, m, 1),
        draw(case.tokens, n, 1),
    )


def _make_forward_inputs(case):
    w, u, v, x, _ = make_layer(case)
    return x, w, u, v


def _make_backward_inputs(case):
    w, u, v, x, dy = make_layer(case)
    return x, w, u, v, dy


def measure_update(inputs, found):
    """Return what is judged of w + scale * u @ v, on rows from the first to the last.

    relative error: ‖found − exact‖_F / ‖exact‖_F.
    error of the delta: the same over ‖scale * u @ v‖_F: what storing the sum costs the update.
    """
    rows = _choose_rows(found)
    w, u, v = (
        np.asarray(x, np.float64) for x in (inputs[0][rows], inputs[1][rows], inputs[2])
    )
    delta = SCALE * u @ v
    error = np.linalg.norm(np.asarray(found[rows], np.float64) - w - delta)
    return {
        "relative error": error / np.linalg.norm(w + delta),
        "error of the delta": error / np.linalg.norm(delta),
    }


# Some rows of each part of a layer's step. A baseline without a delta names its parts "plain".
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
    """Return the relative error in Frobenius norm of the worst part of a result, and of each."""
    exact = [np.asarray(x, np.float64) for x in inputs]
    errors = {}
    for part, found in result.items():
        rows = _choose_rows(found)
        expected = _EXPECTED[part](rows, *exact)
        difference = np.linalg.norm(np.asarray(found[rows], np.float64) - expected)
        errors[f"relative error of {part}"] = difference / np.linalg.norm(expected)
    return {"relative error": max(errors.values()), **errors}


def _choose_rows(found):
    # Evenly, the last one too: all of them would take float64 longer than the runs.
    return np.unique(np.linspace(0, len(found) - 1, _ROWS_CHECKED).astype(int))
