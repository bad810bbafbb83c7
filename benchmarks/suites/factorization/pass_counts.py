"""The excess error after each number of passes, from one long iteration."""

import jax
import numpy as np

from benchmarks.run.cases import make_weights
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.run.svd_errors import compute_singular_values
from jlora.factorization.krylov import project_onto_krylov
from jlora.factorization.passes import plan_iteration
from jlora.factorization.sketch import gaussian_sketch

SUITE = "factorization"
_MOST_BLOCKS = 15


def make_choice_group(case):
    """Return the group that shows the excess error after each number of passes.

    The default number of passes was chosen from these errors. One long iteration holds
    all shorter ones: their small matrices are the leading parts of its small matrix.
    """
    sizes = plan_iteration(case.shape, case.rank)
    num_passes, block = sizes.num_passes, sizes.block_size
    num_blocks = min(_MOST_BLOCKS, min(case.shape) // block - 1)
    # The default comes first: the first error is the one to judge by.
    fewest = -(-case.rank // block)
    counts = dict.fromkeys([num_passes // 2, *range(fewest, num_blocks + 1)])

    def prepare(a):
        def iterate(a):
            sketch_key, basis_key = jax.random.split(jax.random.key(0))
            omega = gaussian_sketch(sketch_key, block, a.shape[-1], a.dtype)
            return project_onto_krylov(a, omega, num_blocks, key=basis_key).core

        return prepare_jax(iterate, a)

    def measure_errors(inputs, core):
        errors = {}
        for count in counts:
            leading = core[..., : count * block, : (count + 1) * block]
            kind = f"excess error, {2 * count} passes"
            errors[kind] = _measure_excess(inputs[0], case.rank, leading)
        return errors

    ours = Contender(
        "jlora krylov",
        prepare,
        "jlora",
        f"the bases alone, {num_blocks} blocks of {block}, the default",
    )
    return Group(
        SUITE,
        "choice of passes",
        case,
        lambda: (make_weights(case),),
        (ours,),
        measure_errors,
    )


def _measure_excess(a, rank, core):
    """Return the largest excess error, computed from the singular values of the core.

    The bases are orthonormal, so the squares that the core lacks are the squared error.
    """
    matrices = a.reshape(-1, *a.shape[-2:])
    cores = core.reshape(-1, *core.shape[-2:])

    worst = -np.inf
    for matrix, inner in zip(matrices, cores, strict=True):
        exact = compute_singular_values(matrix)
        found = np.linalg.svd(inner.astype(np.float64), compute_uv=False)[:rank]
        remainder = np.sum(exact**2) - np.sum(found**2)
        best = np.linalg.norm(exact[rank:])
        worst = max(worst, np.sqrt(max(remainder, 0)) / best - 1)
    return worst
