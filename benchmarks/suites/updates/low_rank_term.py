"""A term of low rank added to an SVD."""

import functools

import jax
import numpy as np

import jlora
from benchmarks.peers.svd import truncate_svd
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch
from benchmarks.run.svd_errors import measure_orthogonality
from benchmarks.suites.updates.factors import (
    SUITE,
    compute_core,
    count_least_work,
    make_factors,
    measure_distance,
)
from benchmarks.suites.updates.torch_methods import decompose_product

_TERM_RANK = 8


def make_add_group(case):
    """Return the group that adds a term of rank 8 to an SVD, no component dropped."""
    rank = case.rank + _TERM_RANK
    contenders = (
        Contender(
            "jlora add_low_rank",
            functools.partial(prepare_jax, _run_ours),
            "jlora",
            f"a term of rank {_TERM_RANK}",
        ),
        Contender(
            "jlora randomized_svd",
            functools.partial(_prepare_fresh, rank),
            "jlora",
            f"of the sum, formed beforehand, rank {rank}, all defaults",
        ),
        Contender(
            "torch QR of both sides",
            functools.partial(prepare_torch, functools.partial(_run_torch, rank)),
            setting="factors joined, QR of both, SVD of the core",
            requires=("torch",),
        ),
    )

    return Group(
        SUITE,
        "add low rank",
        case,
        lambda: _make_inputs(case),
        contenders,
        _measure_errors,
        **count_least_work(case.shape, _TERM_RANK, rank),
    )


def _make_inputs(case):
    """Return the SVD (u, s, vt) of random factors, and the factors (x, y) of a term."""
    u, v = make_factors(case, case.rank)
    left, s, right = np.linalg.svd(compute_core(u, v))
    u, vt = np.linalg.qr(u)[0] @ left, right @ np.linalg.qr(v.T)[0].T
    x, y = make_factors(case, _TERM_RANK, seed=1)
    return tuple(part.astype(np.float32) for part in (u, s, vt, x, y))


def _run_ours(u, s, vt, x, y):
    return jlora.updates.add_low_rank(jlora.SVD(u, s, vt), x, y)


def _prepare_fresh(rank, u, s, vt, x, y):
    key = jax.random.key(0)

    def solve(a):
        return jlora.randomized_svd(a, rank, key=key)

    return prepare_jax(solve, (u * s) @ vt + x @ y)


def _run_torch(rank, u, s, vt, x, y):
    import torch

    joined = torch.cat([u * s, x], 1), torch.cat([vt, y], 0)
    return truncate_svd(rank, *decompose_product(*joined))


def _measure_errors(inputs, svd):
    u, s, vt, x, y = (part.astype(np.float64) for part in inputs)
    left, values, right = (np.asarray(part, np.float64) for part in svd)

    total = np.concatenate([u * s, x], 1), np.concatenate([vt, y], 0)
    distance = measure_distance(total, (left * values, right))
    return {
        "relative error": distance / np.linalg.norm(compute_core(*total)),
        "orthogonality": measure_orthogonality(left, right),
    }
