"""The truncated SVD of one case: jlora at its settings beside its peers."""

import functools

import jax

import jlora
from benchmarks.peers.svd import list_svd_peers
from benchmarks.run.cases import make_weights
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.run.svd_errors import measure_svd_errors

SUITE = "factorization"
OPERATION = "truncated svd"
_PASSES = {"quick": (6, 10, 16), "full": (4, 8, 10, 12, 14, 16, 17, 18, 20)}
# The full decomposition of a matrix with a larger small side takes too long.
_LARGEST_TRUNCATED = 1024


def make_group(case, level_name, platform, *, with_full):
    """Return the group of one case.

    Args:
        with_full: Whether peers that decompose the whole matrix take part.
    """
    m, n = case.shape
    layers = max(case.layers, 1)
    itemsize = 2 if case.dtype == "bfloat16" else 4

    ours = _list_ours(case, level_name)
    peers = list_svd_peers(case, platform, with_full=with_full)
    return Group(
        SUITE,
        OPERATION,
        case,
        lambda: (make_weights(case),),
        (*ours, *peers),
        lambda inputs, svd: measure_svd_errors(inputs[0], svd),
        # The least work: read the matrix once, and multiply for a sketch and for a
        # projection.
        flops=4.0 * layers * m * n * case.rank,
        bytes=1.0 * layers * m * n * itemsize,
    )


def prepare_svd(case, a, **settings):
    """Return `randomized_svd` of the case's rank, compiled for a."""
    key = jax.random.key(0)

    def solve(a):
        return jlora.randomized_svd(a, case.rank, key=key, **settings)

    return prepare_jax(solve, a)


def _list_ours(case, level_name):
    subspace = Contender(
        "jlora subspace",
        functools.partial(prepare_svd, case, method="subspace"),
        "jlora",
        "num_passes and block_size at their defaults",
    )
    default = Contender(
        "jlora krylov", functools.partial(prepare_svd, case), "jlora", "all defaults"
    )
    swept = [_make_krylov(case, num_passes) for num_passes in _PASSES[level_name]]
    ours = [default, *swept, subspace]

    if min(case.shape) <= _LARGEST_TRUNCATED:
        truncated = Contender(
            "jlora truncated_svd",
            functools.partial(_prepare_truncated, case),
            "jlora",
            "full decomposition, cut",
            most_runs=3,
        )
        ours.append(truncated)
    return ours


def _make_krylov(case, num_passes):
    return Contender(
        f"jlora krylov {num_passes} passes",
        functools.partial(prepare_svd, case, num_passes=num_passes),
        "jlora",
        "block_size at its default",
    )


def _prepare_truncated(case, a):
    return prepare_jax(lambda a: jlora.truncated_svd(a, case.rank), a)
