"""Both sides of factors made equally large, with the same product."""

import functools

import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch
from benchmarks.suites.updates.factors import (
    SUITE,
    compute_core,
    count_least_work,
    make_factors,
    measure_distance,
)
from benchmarks.suites.updates.torch_methods import decompose_product


def make_balance_group(case):
    """Return the group that balances factors of the case's rank."""
    contenders = (
        Contender("jlora balance", functools.partial(prepare_jax, _run_ours), "jlora"),
        Contender(
            "torch QR of both sides",
            functools.partial(prepare_torch, _run_torch),
            setting="QR of both, SVD of the core, its root on each side",
            requires=("torch",),
        ),
    )

    return Group(
        SUITE,
        "balance",
        case,
        lambda: make_factors(case, case.rank),
        contenders,
        measure_balance,
        **count_least_work(case.shape, case.rank, case.rank),
    )


def _run_ours(u, v):
    return jlora.updates.balance(jlora.Factors(u, v))


def _run_torch(u, v):
    import torch

    left, s, right = decompose_product(u, v)
    root = torch.sqrt(s)
    return left * root, root[:, None] * right


def measure_balance(inputs, found):
    """Return the errors of balanced factors, in float64.

    relative error: ‖uv − found‖_F / ‖uv‖_F; the optimum has no error.
    imbalance: ‖uᵀu − vvᵀ‖_F / ‖uᵀu‖_F of the found u and v.
    """
    u, v = (np.asarray(part, np.float64) for part in found)
    norm = np.linalg.norm(compute_core(*inputs))
    return {
        "relative error": measure_distance(inputs, (u, v)) / norm,
        "imbalance": np.linalg.norm(u.T @ u - v @ v.T) / np.linalg.norm(u.T @ u),
    }
