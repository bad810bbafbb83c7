"""Truncated SVD of weights: jlora at its settings beside everybody else's."""

import functools

import jlora
from benchmarks.peers.svd import list_svd_peers
from benchmarks.run.cases import Case, make_weights
from benchmarks.run.harness import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.run.svd_errors import measure_svd_errors
from benchmarks.suites.factorization import defaults
from benchmarks.suites.factorization.defaults import prepare_svd

SUITE = "factorization"
OPERATION = "truncated svd"
_PASSES = {"quick": (6, 10, 16), "full": (4, 8, 10, 12, 14, 16, 17, 18, 20)}
_SPECTRA = ("spiked", "flat", "exponential")


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    if level_name == "quick":
        return [
            make_group(case, level_name, platform, with_full=True)
            for case in _list_quick_cases()
        ]
    # The full decomposition of a large matrix takes minutes here and is no contender above 2048.
    most = 4096 if platform == "gpu" else 2048
    groups = [
        make_group(
            case,
            level_name,
            platform,
            with_full=max(case.shape) <= most and case.rank == 64,
        )
        for case in _list_full_cases(platform)
    ]
    return groups + defaults.list_groups()


def make_group(case, level_name, platform, *, with_full):
    """Return the group of one case."""
    m, n = case.shape
    layers = max(case.layers, 1)
    itemsize = 2 if case.dtype == "bfloat16" else 4
    return Group(
        SUITE,
        OPERATION,
        case,
        lambda: (make_weights(case),),
        (
            *_list_ours(case, level_name),
            *list_svd_peers(case, platform, with_full=with_full),
        ),
        lambda inputs, svd: measure_svd_errors(inputs[0], svd),
        # Nobody gets below one look at the matrix and the products of one sketch and projection.
        flops=4.0 * layers * m * n * case.rank,
        bytes=1.0 * layers * m * n * itemsize,
    )


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
    small = [
        Case("llama-3.2-1b", "attention", rank, "spiked") for rank in (16, 64, 128)
    ]
    small += [
        Case("llama-3.2-1b", "attention", 64, spectrum)
        for spectrum in ("flat", "exponential", "low rank plus noise")
    ]
    small += [
        Case("gpt-2-medium", "output", rank, "spiked", layers=8) for rank in (16, 64)
    ]
    small += [
        Case("minilm-l6", layer, rank, "pretrained", layers=6)
        for layer in ("attention", "mlp up", "mlp down")
        for rank in (16, 64)
    ]
    large = [Case("llama-2-7b", "attention", rank, "spiked") for rank in (16, 64, 128)]
    large += [
        Case("llama-2-7b", "attention", 64, spectrum) for spectrum in _SPECTRA[1:]
    ]
    large += [Case("llama-2-7b", "mlp up", rank, "spiked") for rank in (16, 64, 128)]
    large.append(Case("llama-2-7b", "mlp down", 64, "spiked"))
    large.append(Case("llama-2-7b", "attention", 64, "spiked", "bfloat16"))
    if platform != "cpu":
        large += [
            Case("llama-2-7b", "attention", 64, "spiked", "bfloat16", layers=8),
            Case("llama-2-7b", "attention", 64, "spiked", layers=8),
        ]
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
        f"jlora krylov {num_passes} passes",
        _prepare_with(case, num_passes=num_passes),
        "jlora",
        "block_size at its default",
    )


def _prepare_with(case, **settings):
    return functools.partial(prepare_svd, case, **settings)


def _prepare_truncated(case, a):
    return prepare_jax(lambda a: jlora.truncated_svd(a, case.rank), a)
