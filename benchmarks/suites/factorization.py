"""Truncated SVD of weights: jlora at its settings beside everybody else's."""

import functools

import jax

import jlora
from benchmarks.cases import Case, make_weights
from benchmarks.harness import Contender, Group
from benchmarks.preparation import fetch_jax, prepare_jax
from benchmarks.svd_errors import measure_svd_errors
from benchmarks.svd_peers import list_svd_peers
from jlora.factorization.products import multiply, multiply_transposed
from jlora.factorization.svd import plan_iteration

SUITE = "factorization"
OPERATION = "truncated svd"
_PASSES = {"quick": (6, 10, 16), "full": (4, 6, 8, 10, 12, 16)}
_SPECTRA = ("spiked", "flat", "exponential")


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    if level_name == "quick":
        return [make_group(case, level_name, platform, with_full=True)
                for case in _list_quick_cases()]  # fmt: skip
    # The full decomposition of a large matrix takes minutes here and is no contender above 2048.
    most = 4096 if platform == "gpu" else 2048
    groups = [
        make_group(
            case, level_name, platform, with_full=max(case.shape) <= most and case.rank == 64
        )
        for case in _list_full_cases(platform)
    ]
    groups.append(make_split_group(Case("llama-2-7b", "attention", 64)))
    groups.append(make_seeds_group(Case("llama-3.2-1b", "attention", 64)))
    return groups


def make_seeds_group(case, num_seeds=20):
    """Return the group that shows the worst of many seeds at the default setting."""

    def prepare(a):
        return prepare_jax(
            lambda a, key: jlora.randomized_svd(a, case.rank, key=key), a, jax.random.key(0)
        )

    def measure_errors(inputs, first):
        solve = jax.jit(lambda a, key: jlora.randomized_svd(a, case.rank, key=key))
        excess = [
            measure_svd_errors(inputs[0], fetch_jax(solve(inputs[0], jax.random.key(seed))))
            for seed in range(num_seeds)
        ]
        return {"worst excess error": max(errors["excess error"] for errors in excess)}

    ours = Contender("jlora krylov", prepare, "jlora", f"all defaults, {num_seeds} seeds")
    return Group(SUITE, "twenty seeds", case, lambda: (make_weights(case),), (ours,),
                 measure_errors)  # fmt: skip


def make_split_group(case):
    """Return the group that times the products of a decomposition alone, beside the whole."""
    m, n = case.shape

    def prepare_products(a):
        num_blocks, block = _measure_default_blocks(case)

        def multiply_only(a, rows):
            def step(_, rows):
                # Scaled, so that the numbers stay numbers; nothing is orthonormalised.
                return multiply_transposed(a, multiply(a, rows)) / 1e3

            return jax.lax.fori_loop(0, num_blocks, step, rows)

        rows = jax.random.normal(jax.random.key(0), (block, n), "float32")
        return prepare_jax(multiply_only, a, rows)

    def measure_errors(inputs, result):
        if not isinstance(result, tuple):
            return {}
        num_blocks, block = _measure_default_blocks(case)
        compiled = _prepare_with(case)(*inputs)
        return {
            **measure_svd_errors(inputs[0], result),
            "temporary over basis": compiled.temporary_bytes / (4 * (m + n) * num_blocks * block),
        }

    contenders = (
        Contender("jlora krylov", _prepare_with(case), "jlora", "all defaults"),
        Contender("products alone", prepare_products, "jlora",
                  "the same passes, nothing between them"),
    )  # fmt: skip
    return Group(SUITE, "split of the time", case, lambda: (make_weights(case),), contenders,
                 measure_errors)  # fmt: skip


def _measure_default_blocks(case):
    """Return (number of blocks, rows of one) that randomized_svd chooses for a case."""
    num_passes, block, _ = plan_iteration(case.shape, case.rank)
    return num_passes // 2, block


def make_group(case, level_name, platform, *, with_full):
    """Return the group of one case."""
    m, n = case.shape
    layers = max(case.layers, 1)
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return Group(
        SUITE, OPERATION, case, lambda: (make_weights(case),),
        (*_list_ours(case, level_name), *list_svd_peers(case, platform, with_full=with_full)),
        lambda inputs, svd: measure_svd_errors(inputs[0], svd),
        # Nobody gets below one look at the matrix and the products of one sketch and projection.
        flops=4.0 * layers * m * n * case.rank,
        bytes=1.0 * layers * m * n * itemsize,
    )  # fmt: skip


def _list_quick_cases():
    return [
        Case("gpt-2-medium", "output", 16, "spiked"),
        Case("gpt-2-medium", "output", 64, "spiked"),
        Case("bert-base", "mlp up", 16, "flat"),
        Case("bert-base", "attention", 16, "exponential"),
        Case("bert-base", "attention", 16, "spiked", layers=4),
        Case("minilm-l6", "mlp up", 16, "pretrained", layers=6),
    ]


def _list_full_cases(platform):
    small = [Case("llama-3.2-1b", "attention", rank, "spiked") for rank in (16, 64, 128)]
    small += [Case("llama-3.2-1b", "attention", 64, spectrum)
              for spectrum in ("flat", "exponential", "low rank plus noise")]  # fmt: skip
    small += [Case("gpt-2-medium", "output", rank, "spiked", layers=8) for rank in (16, 64)]
    small += [Case("minilm-l6", layer, rank, "pretrained", layers=6)
              for layer in ("attention", "mlp up", "mlp down") for rank in (16, 64)]  # fmt: skip
    large = [Case("llama-2-7b", "attention", rank, "spiked") for rank in (16, 64, 128)]
    large += [Case("llama-2-7b", "attention", 64, spectrum) for spectrum in _SPECTRA[1:]]
    large += [Case("llama-2-7b", "mlp up", rank, "spiked") for rank in (16, 64, 128)]
    large.append(Case("llama-2-7b", "mlp down", 64, "spiked"))
    large.append(Case("llama-2-7b", "attention", 64, "spiked", "bfloat16"))
    if platform != "cpu":
        large += [Case("llama-2-7b", "attention", 64, "spiked", "bfloat16", layers=8),
                  Case("llama-2-7b", "attention", 64, "spiked", layers=8)]  # fmt: skip
    return small + large


def _list_ours(case, level_name):
    ours = [_make_krylov(case, None)]
    ours += [_make_krylov(case, passes) for passes in _PASSES[level_name]]
    ours.append(
        Contender(
            "jlora subspace",
            _prepare_with(case, method="subspace"),
            "jlora",
            "num_passes and block_size at their defaults",
        )
    )
    if min(case.shape) <= 1024:
        ours.append(
            Contender(
                "jlora truncated_svd",
                functools.partial(_prepare_truncated, case),
                "jlora",
                "full decomposition, cut",
                most_runs=3,
            )
        )
    return ours


def _make_krylov(case, num_passes):
    if num_passes is None:
        return Contender("jlora krylov", _prepare_with(case), "jlora", "all defaults")
    return Contender(
        f"jlora krylov {num_passes} passes", _prepare_with(case, num_passes=num_passes), "jlora",
        "block_size at its default",
    )  # fmt: skip


def _prepare_with(case, **settings):
    def prepare(a):
        key = jax.random.key(0)
        return prepare_jax(lambda a: jlora.randomized_svd(a, case.rank, key=key, **settings), a)

    return prepare


def _prepare_truncated(case, a):
    return prepare_jax(lambda a: jlora.truncated_svd(a, case.rank), a)
