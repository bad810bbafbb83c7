"""The time of the matrix products of a decomposition, beside the whole."""

import functools

import jax

from benchmarks.run.cases import make_weights
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.run.svd_errors import measure_svd_errors
from benchmarks.suites.factorization.truncated_svd import prepare_svd
from jlora.factorization.operators import multiply, multiply_transposed
from jlora.factorization.passes import plan_iteration

SUITE = "factorization"


def make_split_group(case):
    """Return the group that times a decomposition, and only the products of it."""
    contenders = (
        Contender(
            "jlora krylov",
            functools.partial(prepare_svd, case),
            "jlora",
            "all defaults",
        ),
        Contender(
            "products alone",
            functools.partial(_prepare_products, case),
            "jlora",
            "the same passes, nothing between them",
        ),
    )

    return Group(
        SUITE,
        "split of the time",
        case,
        lambda: (make_weights(case),),
        contenders,
        _measure_errors,
    )


def _prepare_products(case, a):
    sizes = plan_iteration(case.shape, case.rank)

    def multiply_only(a, rows):
        def step(_, rows):
            # Scaled, because nothing is orthonormalised: the values would overflow.
            return multiply_transposed(a, multiply(a, rows)) / 1e3

        return jax.lax.fori_loop(0, sizes.num_passes // 2, step, rows)

    shape = sizes.block_size, case.shape[1]
    rows = jax.random.normal(jax.random.key(0), shape, "float32")
    return prepare_jax(multiply_only, a, rows)


def _measure_errors(inputs, result):
    # The products yield one array, which has no error.
    is_svd = isinstance(result, tuple)
    return measure_svd_errors(inputs[0], result) if is_svd else {}
