"""An adapter resized to a smaller rank, and several adapters combined into one."""

import functools

import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.run.svd_errors import measure_orthogonality
from benchmarks.suites.updates.factors import (
    SUITE,
    compute_core,
    count_least_work,
    make_factors,
    measure_distance,
)
from benchmarks.suites.updates.torch_methods import list_torch_methods

# Of the adapters combined.
_WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def make_recompress_group(case, source_rank):
    """Return the group that resizes an adapter of `source_rank` to the case's rank."""

    def run(u, v):
        return jlora.recompress(jlora.Factors(u, v), case.rank)

    ours = Contender(
        "jlora recompress",
        functools.partial(prepare_jax, run),
        "jlora",
        f"from factors of rank {source_rank}",
    )
    peers = list_torch_methods(case.rank, lambda u, v: (u, v))
    return Group(
        SUITE,
        "recompress",
        case,
        lambda: make_factors(case, source_rank),
        (ours, *peers),
        lambda inputs, svd: measure_excess(*inputs, svd),
        **count_least_work(case.shape, source_rank, case.rank),
    )


def make_combine_group(case):
    """Return the group that combines eight adapters of the case's rank into one.

    The inputs are all u, then all v.
    """
    count = len(_WEIGHTS)

    def run(*factors):
        pairs = map(jlora.Factors, factors[:count], factors[count:])
        return jlora.recompress(jlora.concatenate_factors(pairs, _WEIGHTS), case.rank)

    def concatenate_torch(*factors):
        import torch

        us = _scale_by_weights(factors[:count])
        return torch.cat(us, 1), torch.cat(factors[count:], 0)

    def make_inputs():
        pairs = [make_factors(case, case.rank, seed) for seed in range(count)]
        us, vs = zip(*pairs, strict=True)
        return *us, *vs

    def measure_errors(inputs, svd):
        us = [np.asarray(u, np.float64) for u in inputs[:count]]
        u = np.concatenate(_scale_by_weights(us), 1)
        return measure_excess(u, np.concatenate(inputs[count:], 0), svd)

    ours = Contender(
        "jlora concatenate, recompress",
        functools.partial(prepare_jax, run),
        "jlora",
        f"{count} weighted adapters, concatenate_factors, one recompress",
    )
    return Group(
        SUITE,
        "combine adapters",
        case,
        make_inputs,
        (ours, *list_torch_methods(case.rank, concatenate_torch)),
        measure_errors,
        **count_least_work(case.shape, count * case.rank, case.rank),
    )


def _scale_by_weights(us):
    return [weight * u for weight, u in zip(_WEIGHTS, us, strict=True)]


def measure_excess(u, v, svd):
    """Return the errors of a truncated SVD (NumPy u, s, vt) of u @ v, in float64.

    excess error: ‖uv − found‖_F / ‖uv − best‖_F − 1.
    orthogonality: max |uᵀu − I|, |vvᵀ − I| of the found u and v.
    """
    left, s, right = (np.asarray(part, np.float64) for part in svd)
    values = np.linalg.svd(compute_core(u, v), compute_uv=False)
    best = np.linalg.norm(values[len(s) :])
    return {
        "excess error": measure_distance((u, v), (left * s, right)) / best - 1,
        "orthogonality": measure_orthogonality(left, right),
    }
