"""Factors → factors: adapters resized, combined, extracted and balanced."""

import functools
import zlib

import jax
import numpy as np

import jlora
from benchmarks.peers.svd import cut_svd, list_svd_peers
from benchmarks.run.cases import Case, make_weights
from benchmarks.run.harness import Contender, Group
from benchmarks.run.preparation import prepare_jax, prepare_torch
from benchmarks.run.svd_errors import measure_orthogonality, measure_svd_errors
from benchmarks.suites.updates import rank_budget

SUITE = "updates"
_WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the adapters combined
_TERM_RANK = 8  # of what is added to an SVD
_SHAPES = {  # level: a square layer and a wide one
    "quick": (("gpt-2-medium", "output"), ("gpt-2-medium", "output")),
    "full": (("llama-2-7b", "attention"), ("llama-2-7b", "mlp up")),
}


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    square, wide = _SHAPES[level_name]
    rank = 16 if level_name == "quick" else 32
    return [
        make_add_group(Case(*square, 64, "factors")),
        rank_budget.make_allocate_group(SUITE),
        make_recompress_group(Case(*square, rank, "factors"), 4 * rank),
        make_combine_group(Case(*wide, 16, "factors")),
        make_extract_group(Case(*square, 32, "low rank plus noise"), platform),
        make_balance_group(Case(*square, 64, "factors")),
    ]


def make_recompress_group(case, source_rank):
    """Return the group that resizes an adapter of `source_rank` to the rank of the case."""

    def run(u, v):
        return jlora.recompress(jlora.Factors(u, v), case.rank)

    ours = Contender(
        "jlora recompress",
        functools.partial(prepare_jax, run),
        "jlora",
        f"from factors of rank {source_rank}",
    )
    return Group(
        SUITE,
        "recompress",
        case,
        lambda: make_factors(case, source_rank),
        (ours, *_list_torch_roads(case.rank, lambda u, v: (u, v))),
        lambda inputs, svd: measure_excess(*inputs, svd),
        **_count_least_work(case.shape, source_rank, case.rank),
    )


def make_combine_group(case):
    """Return the group that combines eight adapters of the case's rank into one."""
    count = len(_WEIGHTS)

    def run(*factors):
        pairs = map(jlora.Factors, factors[:count], factors[count:])
        return jlora.recompress(jlora.concatenate_factors(pairs, _WEIGHTS), case.rank)

    def concatenate_torch(*factors):
        import torch

        us = [weight * u for weight, u in zip(_WEIGHTS, factors[:count], strict=True)]
        return torch.cat(us, 1), torch.cat(factors[count:], 0)

    def make_inputs():
        us, vs = zip(
            *(make_factors(case, case.rank, seed) for seed in range(count)), strict=True
        )
        return *us, *vs

    def measure_errors(inputs, svd):
        us = [
            weight * np.asarray(u, np.float64)
            for weight, u in zip(_WEIGHTS, inputs[:count], strict=True)
        ]
        return measure_excess(
            np.concatenate(us, 1), np.concatenate(inputs[count:], 0), svd
        )

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
        (ours, *_list_torch_roads(case.rank, concatenate_torch)),
        measure_errors,
        **_count_least_work(case.shape, count * case.rank, case.rank),
    )


def make_add_group(case):
    """Return the group that adds a term of rank 8 to an SVD of the case's rank, all kept."""
    rank = case.rank + _TERM_RANK

    def make_inputs():
        u, v = make_factors(case, case.rank)
        left, s, right = np.linalg.svd(_make_core(u, v))
        u, v = np.linalg.qr(u)[0] @ left, right @ np.linalg.qr(v.T)[0].T
        x, y = make_factors(case, _TERM_RANK, seed=1)
        return tuple(part.astype(np.float32) for part in (u, s, v, x, y))

    def add(u, s, vt, x, y):
        return jlora.updates.add_low_rank(jlora.SVD(u, s, vt), x, y)

    def prepare_fresh(u, s, vt, x, y):
        key = jax.random.key(0)
        return prepare_jax(
            lambda a: jlora.randomized_svd(a, rank, key=key), (u * s) @ vt + x @ y
        )

    def join_torch(u, s, vt, x, y):
        import torch

        return torch.cat([u * s, x], 1), torch.cat([vt, y], 0)

    def run_torch(*inputs):
        return cut_svd(rank, *_decompose_torch(*join_torch(*inputs)))

    def measure_errors(inputs, found):
        u, s, vt, x, y = (part.astype(np.float64) for part in inputs)
        left, values, right = (np.asarray(part, np.float64) for part in found)
        total = np.concatenate([u * s, x], 1), np.concatenate([vt, y], 0)
        distance = _measure_distance(total, (left * values, right))
        return {
            "relative error": distance / np.linalg.norm(_make_core(*total)),
            "orthogonality": measure_orthogonality(left, right),
        }

    contenders = (
        Contender(
            "jlora add_low_rank",
            functools.partial(prepare_jax, add),
            "jlora",
            f"a term of rank {_TERM_RANK}",
        ),
        Contender(
            "jlora randomized_svd",
            prepare_fresh,
            "jlora",
            f"of the sum, formed beforehand, rank {rank}, all defaults",
        ),
        Contender(
            "torch QR of both sides",
            functools.partial(prepare_torch, run_torch),
            setting="factors joined, QR of both, SVD of the core",
            requires=("torch",),
        ),
    )
    return Group(
        SUITE,
        "add low rank",
        case,
        make_inputs,
        contenders,
        measure_errors,
        **_count_least_work(case.shape, _TERM_RANK, rank),
    )


def make_extract_group(case, platform):
    """Return the group that finds the adapter in the difference of two float32 weights."""
    m, n = case.shape

    def prepare(difference):
        key = jax.random.key(0)
        return prepare_jax(
            lambda a: jlora.randomized_svd(a, case.rank, key=key), difference
        )

    ours = Contender("jlora randomized_svd", prepare, "jlora", "all defaults")
    peers = [
        peer for peer in list_svd_peers(case, platform) if peer.name.startswith("torch")
    ]
    return Group(
        SUITE,
        "extract adapter",
        case,
        lambda: (_make_difference(case),),
        (ours, *peers),
        lambda inputs, svd: measure_svd_errors(inputs[0], svd),
        # One sketch and one projection, one look at the matrix.
        flops=4.0 * m * n * case.rank,
        bytes=4.0 * m * n,
    )


def make_balance_group(case):
    """Return the group that evens out the two sides of factors, their product kept."""

    def run_torch(u, v):
        import torch

        left, s, right = _decompose_torch(u, v)
        root = torch.sqrt(s)
        return left * root, root[:, None] * right

    contenders = (
        Contender("jlora balance", _prepare_balance, "jlora"),
        Contender(
            "torch QR of both sides",
            functools.partial(prepare_torch, run_torch),
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
        **_count_least_work(case.shape, case.rank, case.rank),
    )


def _prepare_balance(u, v):
    return prepare_jax(lambda u, v: jlora.updates.balance(jlora.Factors(u, v)), u, v)


def make_factors(case, rank, seed=0):
    """Return float32 (u [m, rank], v [rank, n]): singular values near 1, 1/2, 1/3, ... mixed.

    Both sides are dense in their columns, as after training, not already an SVD.
    """
    m, n = case.shape
    rng = np.random.default_rng(zlib.crc32(f"{m} {n} {rank} {seed}".encode()))
    mix = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    u = rng.standard_normal((m, rank)) / np.sqrt(m)
    v = rng.standard_normal((rank, n)) / np.sqrt(n) / np.arange(1, rank + 1)[:, None]
    return (u @ mix).astype(np.float32), (mix.T @ v).astype(np.float32)


def _make_difference(case):
    # Through a base and its fine-tuned sum, so that their rounding is in it.
    base = np.random.default_rng(0).standard_normal(case.shape, np.float32)
    base /= np.float32(np.sqrt(case.shape[0]))
    return (base + make_weights(case)) - base


def _count_least_work(shape, source_rank, rank):
    """Return the flops and bytes of: both Gram matrices, half of each, and two thin products."""
    total = sum(shape)
    return {
        "flops": 1.0 * total * source_rank * (source_rank + 2 * rank),
        "bytes": 4.0 * total * (source_rank + rank),
    }


def _list_torch_roads(rank, join):
    """Return torch's roads to the cut SVD of the product of `join(*inputs)` = (u, v)."""

    def run_dense(*inputs):
        import torch

        u, v = join(*inputs)
        return cut_svd(rank, *torch.linalg.svd(u @ v, full_matrices=False))

    def run_lowrank(num_iterations, *inputs):
        import torch

        u, v = join(*inputs)
        left, s, right = torch.svd_lowrank(u @ v, q=rank, niter=num_iterations)
        return left, s, right.mT

    def run_thin(*inputs):
        return cut_svd(rank, *_decompose_torch(*join(*inputs)))

    roads = [
        ("torch dense road", run_dense, "the product formed, its thin SVD, cut", 2),
        *(
            (
                f"torch.svd_lowrank niter {count}",
                functools.partial(run_lowrank, count),
                f"of the product, formed, q = rank, niter = {count}",
                None,
            )
            for count in (4, 16)
        ),
        ("torch QR of both sides", run_thin, "QR of both, SVD of the core, cut", None),
    ]
    return [
        Contender(
            name,
            functools.partial(prepare_torch, run),
            setting=setting,
            requires=("torch",),
            most_runs=most_runs,
        )
        for name, run, setting, most_runs in roads
    ]


def _decompose_torch(u, v):
    import torch

    q_u, r_u = torch.linalg.qr(u)
    q_v, r_v = torch.linalg.qr(v.mT)
    left, s, right = torch.linalg.svd(r_u @ r_v.mT)
    return q_u @ left, s, right @ q_v.mT


def measure_excess(u, v, svd):
    """Return what is judged of the cut SVD (NumPy u, s, vt) of a product of factors, in float64.

    excess error: ‖uv − found‖_F / ‖uv − best‖_F − 1.
    orthogonality: max |uᵀu − I|, |vvᵀ − I| of what was found.
    """
    left, s, right = (np.asarray(part, np.float64) for part in svd)
    best = np.linalg.norm(np.linalg.svd(_make_core(u, v), compute_uv=False)[len(s) :])
    return {
        "excess error": _measure_distance((u, v), (left * s, right)) / best - 1,
        "orthogonality": measure_orthogonality(left, right),
    }


def measure_balance(inputs, found):
    """Return what is judged of balanced factors, in float64.

    relative error: ‖uv − found‖_F / ‖uv‖_F, as no error at all is the optimum.
    imbalance: ‖uᵀu − vvᵀ‖_F / ‖uᵀu‖_F of what was found.
    """
    u, v = (np.asarray(part, np.float64) for part in found)
    norm = np.linalg.norm(_make_core(*inputs))
    return {
        "relative error": _measure_distance(inputs, (u, v)) / norm,
        "imbalance": np.linalg.norm(u.T @ u - v @ v.T) / np.linalg.norm(u.T @ u),
    }


def _measure_distance(factors, others):
    """Return the Frobenius norm of the difference of two products, neither formed."""
    u, v = factors
    return np.linalg.norm(
        _make_core(
            np.concatenate([u, others[0]], 1), np.concatenate([v, -others[1]], 0)
        )
    )


def _make_core(u, v):
    """Return the small matrix that has the singular values of u @ v."""
    r_u, r_v = (
        np.linalg.qr(np.asarray(x, np.float64), mode="r") for x in (u, np.transpose(v))
    )
    return r_u @ r_v.T
