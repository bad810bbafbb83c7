"""Groups of the factorization suite: what the defaults rest on, and what they promise."""

import functools

import jax
import numpy as np

import jlora
from benchmarks.run.ahead_of_time import TARGETS
from benchmarks.run.cases import Case, NamedCase, make_weights
from benchmarks.run.compiled import make_compile_group
from benchmarks.run.harness import Contender, Group, Prepared
from benchmarks.run.preparation import fetch_jax, prepare_jax
from benchmarks.run.svd_errors import compute_singular_values, measure_svd_errors
from jlora.factorization.krylov import krylov_factors
from jlora.factorization.operators import multiply, multiply_transposed
from jlora.factorization.passes import plan_iteration
from jlora.factorization.sketch import gaussian_sketch

SUITE = "factorization"
_NUM_SEEDS = 20
_MOST_BLOCKS = 15
_AOT_PROGRAM = "randomized_svd float32"

SEEDS_CASES = [
    *(Case("llama-3.2-1b", "attention", rank) for rank in (16, 64, 128)),
    Case("llama-2-7b", "attention", 64),
    Case("minilm-l6", "mlp down", 16, "pretrained", layers=6),
]
CHOICE_CASES = [
    *(Case("llama-3.2-1b", "attention", rank) for rank in (8, 16, 32, 64, 128)),
    Case("llama-3.2-1b", "attention", 64, "flat"),
    *(Case("llama-2-7b", "attention", rank) for rank in (16, 64, 128)),
    *(
        Case("minilm-l6", layer, 16, "pretrained", layers=6)
        for layer in ("attention", "mlp up", "mlp down")
    ),
    # Of ranks that are a good part of the whole.
    *(
        Case("minilm-l6", layer, 64, "pretrained", layers=6)
        for layer in ("attention", "mlp down")
    ),
    Case("gpt-2", "output", 128),
]
SPLIT_CASE = Case("llama-2-7b", "attention", 64)


def list_groups():
    """Return the groups of this file, which only a full run measures."""
    return [
        make_split_group(SPLIT_CASE),
        *(make_seeds_group(case) for case in SEEDS_CASES),
        *(make_choice_group(case) for case in CHOICE_CASES),
        *(make_svd_compile_group(target) for target in TARGETS),
    ]


def prepare_svd(case, a, **settings):
    """Return `randomized_svd` of the case's rank, made ready."""
    key = jax.random.key(0)
    return prepare_jax(
        lambda a: jlora.randomized_svd(a, case.rank, key=key, **settings), a
    )


def make_seeds_group(case):
    """Return the group that shows the worst of many seeds at the default setting."""

    def prepare(a):
        solve = jax.jit(lambda a, key: jlora.randomized_svd(a, case.rank, key=key))
        a = jax.device_put(a)

        def run():
            return [
                jax.block_until_ready(solve(a, jax.random.key(seed)))
                for seed in range(_NUM_SEEDS)
            ]

        return Prepared(run, fetch_jax)

    def measure_errors(inputs, svds):
        excess = [measure_svd_errors(inputs[0], svd)["excess error"] for svd in svds]
        return {
            "worst excess error": max(excess),
            "median excess error": np.median(excess),
        }

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
        measure_errors,
    )


def make_choice_group(case):
    """Return the group that shows the excess error after each number of passes.

    One long iteration holds all shorter ones: the leading part of its small matrix is theirs.
    """
    num_passes, block, _ = plan_iteration(case.shape, case.rank)
    num_blocks = min(_MOST_BLOCKS, min(case.shape) // block - 1)

    def prepare(a):
        def iterate(a):
            sketch_key, basis_key = jax.random.split(jax.random.key(0))
            omega = gaussian_sketch(sketch_key, block, a.shape[-1], a.dtype)
            return krylov_factors(a, omega, num_blocks, key=basis_key).core

        return prepare_jax(iterate, a)

    # The default first, as the one to judge by.
    every = range(-(-case.rank // block), num_blocks + 1)
    counts = dict.fromkeys([num_passes // 2, *every])

    def measure_errors(inputs, core):
        return {
            f"excess error, {2 * count} passes": _measure_captured(
                inputs[0], case.rank, core[..., : count * block, : (count + 1) * block]
            )
            for count in counts
        }

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


def _measure_captured(a, rank, core):
    """Return the excess error of the worst matrix, from the singular values found inside."""
    m, n = a.shape[-2:]
    worst = -np.inf
    for matrix, inner in zip(
        a.reshape(-1, m, n), core.reshape(-1, *core.shape[-2:]), strict=True
    ):
        exact = compute_singular_values(matrix)
        found = np.linalg.svd(inner.astype(np.float64), compute_uv=False)[:rank]
        left = np.sum(exact**2) - np.sum(found**2)
        worst = max(worst, np.sqrt(max(left, 0)) / np.linalg.norm(exact[rank:]) - 1)
    return worst


def make_split_group(case):
    """Return the group that times the products of a decomposition alone, beside the whole."""
    num_passes, block, _ = plan_iteration(case.shape, case.rank)

    def prepare_products(a):
        def multiply_only(a, rows):
            def step(_, rows):
                # Scaled, so that the numbers stay numbers; nothing is orthonormalised.
                return multiply_transposed(a, multiply(a, rows)) / 1e3

            return jax.lax.fori_loop(0, num_passes // 2, step, rows)

        rows = jax.random.normal(jax.random.key(0), (block, case.shape[1]), "float32")
        return prepare_jax(multiply_only, a, rows)

    def measure_errors(inputs, result):
        return (
            measure_svd_errors(inputs[0], result) if isinstance(result, tuple) else {}
        )

    contenders = (
        Contender(
            "jlora krylov",
            functools.partial(prepare_svd, case),
            "jlora",
            "all defaults",
        ),
        Contender(
            "products alone",
            prepare_products,
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
        measure_errors,
    )


def make_svd_compile_group(target):
    """Return the group that compiles a batch for an accelerator that need not be here."""
    fields = Case("llama-2-7b", "attention", 64, layers=8)
    case = NamedCase(f"{fields.name}, for {target}", fields.shape, fields)
    return make_compile_group(
        SUITE,
        case,
        target,
        _AOT_PROGRAM,
        "jlora krylov",
        "all defaults",
        ("compile_ms", "lower_ms", "temporary_bytes"),
    )
