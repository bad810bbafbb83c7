"""The largest error over twenty seeds at the default setting."""

import jax
import numpy as np

import jlora
from benchmarks.run.cases import make_weights
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.run.preparation import fetch_jax
from benchmarks.run.svd_errors import measure_svd_errors

SUITE = "factorization"
_NUM_SEEDS = 20


def make_seeds_group(case):
    """Return the group of one case; a run decomposes it once for each seed."""

    def prepare(a):
        solve = jax.jit(lambda a, key: jlora.randomized_svd(a, case.rank, key=key))
        a = jax.device_put(a)

        def run():
            keys = map(jax.random.key, range(_NUM_SEEDS))
            return [jax.block_until_ready(solve(a, key)) for key in keys]

        return Prepared(run, fetch_jax)

    ours = Contender(
        "jlora krylov",
        prepare,
        "jlora",
        f"all defaults, {_NUM_SEEDS} seeds",
        most_runs=1,
    )
    return Group(
        SUITE,
        "twenty seeds",
        case,
        lambda: (make_weights(case),),
        (ours,),
        _measure_errors,
    )


def _measure_errors(inputs, svds):
    excess = [measure_svd_errors(inputs[0], svd)["excess error"] for svd in svds]
    return {
        "worst excess error": max(excess),
        "median excess error": np.median(excess),
    }
