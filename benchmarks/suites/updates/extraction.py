"""The adapter inside the difference of two weights."""

import jax
import numpy as np

import jlora
from benchmarks.peers.svd import list_svd_peers
from benchmarks.run.cases import make_weights
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.run.svd_errors import measure_svd_errors
from benchmarks.suites.updates.factors import SUITE


def make_extract_group(case, platform):
    """Return the group that finds the adapter in a difference of float32 weights."""
    m, n = case.shape

    def prepare(difference):
        key = jax.random.key(0)

        def solve(a):
            return jlora.randomized_svd(a, case.rank, key=key)

        return prepare_jax(solve, difference)

    ours = Contender("jlora randomized_svd", prepare, "jlora", "all defaults")
    every_peer = list_svd_peers(case, platform)
    peers = [peer for peer in every_peer if peer.name.startswith("torch")]
    return Group(
        SUITE,
        "extract adapter",
        case,
        lambda: (_make_difference(case),),
        (ours, *peers),
        lambda inputs, svd: measure_svd_errors(inputs[0], svd),
        # One sketch and one projection, and one read of the matrix.
        flops=4.0 * m * n * case.rank,
        bytes=4.0 * m * n,
    )


def _make_difference(case):
    # Subtract a base from its fine-tuned sum, so that the rounding of both is included.
    base = np.random.default_rng(0).standard_normal(case.shape, np.float32)
    base /= np.float32(np.sqrt(case.shape[0]))
    return (base + make_weights(case)) - base
