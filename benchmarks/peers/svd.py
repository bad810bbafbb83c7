"""Other libraries' truncated SVDs, each at the setting that its `Contender` states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.cases import Case
from benchmarks.run.contenders import Contender, Prepared
from benchmarks.run.preparation import prepare_host, prepare_jax, prepare_torch

# Peers that work vector by vector, or on one core only, take minutes above this size.
_LARGEST_OF_SLOW = 3072
_SLOW_PEERS = ("fbpca", "scipy svds", "matfree")
_FEW_RUNS = 3


def list_svd_peers(
    case: Case, platform: str, *, with_full: bool = True
) -> list[Contender]:
    """Return the peers that compute the leading `case.rank` triplets of a matrix.

    Args:
        with_full: Measure the full decompositions too. If False, they are listed as
            skipped.
    """
    peers = _list_truncated(case.rank, platform) + _list_full(case.rank)
    is_large = platform == "cpu" and min(case.shape) > _LARGEST_OF_SLOW
    return [
        _skip_if_slow(peer, with_full=with_full, is_large=is_large) for peer in peers
    ]


def _list_truncated(rank, platform):
    """Return the peers that compute no more than the leading triplets."""
    peers = [
        _make_torch_lowrank(rank, 4),
        _make_torch_lowrank(rank, 16),
        Contender(
            "sklearn randomized_svd",
            functools.partial(_prepare_each, _run_sklearn, rank),
            setting="defaults, random_state 0",
            requires=("sklearn", "threadpoolctl"),
        ),
        Contender(
            "fbpca",
            functools.partial(_prepare_each, _run_fbpca, rank),
            setting="raw, n_iter 4, l = rank + 8",
            requires=("fbpca", "threadpoolctl"),
        ),
        Contender(
            "scipy svds",
            functools.partial(_prepare_each, _run_svds, rank),
            setting="ARPACK, tol 0",
            requires=("scipy", "threadpoolctl"),
            most_runs=_FEW_RUNS,
        ),
        Contender(
            "matfree",
            functools.partial(_prepare_matfree, rank),
            setting="bidiagonalisation of depth 2 rank + 10, full reorthogonalisation",
            requires=("matfree",),
            most_runs=_FEW_RUNS,
        ),
    ]

    if platform == "gpu":
        cupy = Contender(
            "cupy svds",
            functools.partial(_prepare_cupy, rank),
            setting="defaults",
            requires=("cupy",),
            most_runs=_FEW_RUNS,
        )
        peers.append(cupy)
    return peers


def _list_full(rank):
    """Return the peers that compute all triplets and keep the leading ones."""
    prepares = {
        "jnp": (_prepare_jnp_svd, ()),
        "numpy": (_prepare_numpy_svd, ("threadpoolctl",)),
        "torch": (_prepare_torch_svd, ("torch",)),
    }

    return [
        Contender(
            f"{library}.linalg.svd",
            functools.partial(prepare, rank),
            setting="thin, cut to the rank",
            requires=requires,
            most_runs=_FEW_RUNS,
        )
        for library, (prepare, requires) in prepares.items()
    ]


def _skip_if_slow(peer, *, with_full, is_large):
    """Return the peer, with a reason to skip it if it would take too long."""
    if peer.name.endswith("linalg.svd") and not with_full:
        return peer._replace(
            skip="the full decomposition is measured at one rank a shape"
        )
    if is_large and peer.name in _SLOW_PEERS:
        return peer._replace(skip="takes minutes at this size")
    return peer


def truncate_svd(rank, u, s, vt):
    """Return the leading triplets of any library's SVD, batched or not."""
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def _as_float32(a):
    """Return a matrix in float32, not timed: no peer takes bfloat16."""
    return np.asarray(a, np.float32)


def _make_torch_lowrank(rank, num_iterations):
    return Contender(
        f"torch.svd_lowrank niter {num_iterations}",
        functools.partial(_prepare_torch_lowrank, rank, num_iterations),
        setting=f"q = rank, niter = {num_iterations}, as peft calls it",
        requires=("torch",),
    )


def _prepare_torch_lowrank(rank, num_iterations, a):
    def run(a):
        import torch

        u, s, v = torch.svd_lowrank(a, q=rank, niter=num_iterations)
        return u, s, v.mT

    return prepare_torch(run, _as_float32(a))


def _prepare_torch_svd(rank, a):
    def run(a):
        import torch

        return truncate_svd(rank, *torch.linalg.svd(a, full_matrices=False))

    return prepare_torch(run, _as_float32(a))


def _prepare_jnp_svd(rank, a):
    def run(a):
        svd = jnp.linalg.svd(a.astype(jnp.float32), full_matrices=False)
        return truncate_svd(rank, *svd)

    return prepare_jax(run, a)


def _prepare_numpy_svd(rank, a):
    def run(a):
        return truncate_svd(rank, *np.linalg.svd(a, full_matrices=False))

    return prepare_host(run, _as_float32(a))


def _prepare_each(function, rank, a):
    """Prepare a function of one NumPy matrix; a batch is a loop, as its users write."""

    def run(a):
        if a.ndim == 2:
            return function(a, rank)
        svds = [function(x, rank) for x in a]
        return tuple(np.stack(parts) for parts in zip(*svds, strict=True))

    return prepare_host(run, _as_float32(a))


def _run_sklearn(a, rank):
    from sklearn.utils.extmath import randomized_svd

    return randomized_svd(a, rank, random_state=0)


def _run_fbpca(a, rank):
    import fbpca

    return fbpca.pca(a, k=rank, raw=True, n_iter=4, l=min(rank + 8, *a.shape))


def _run_svds(a, rank):
    from scipy.sparse.linalg import svds

    # The singular values are in ascending order.
    u, s, vt = svds(a, k=rank, rng=np.random.default_rng(0))
    return u[:, ::-1], s[::-1], vt[::-1]


def _prepare_matfree(rank, a):
    from matfree import decomp, eig

    depth = min(2 * rank + 10, *a.shape[-2:]) - 1
    decompose = eig.svd_partial(decomp.bidiag(depth, reortho="full"))

    def run_one(a):
        vector = jax.random.normal(jax.random.key(0), a.shape[-1:], a.dtype)
        ut, s, vt = decompose(lambda x: jnp.matmul(a, x, precision="highest"), vector)
        return ut[:rank].T, s[:rank], vt[:rank]

    return prepare_jax(run_one if a.ndim == 2 else jax.vmap(run_one), _as_float32(a))


def _prepare_cupy(rank, a):
    import cupy
    from cupyx.scipy.sparse.linalg import svds

    matrices = [cupy.asarray(x) for x in _as_float32(a).reshape(-1, *a.shape[-2:])]

    def run():
        results = [svds(x, k=rank) for x in matrices]
        cupy.cuda.runtime.deviceSynchronize()
        return results

    def fetch(results):
        stacks = [
            np.stack([part.get() for part in parts])
            for parts in zip(*results, strict=True)
        ]
        u, s, vt = (stack.reshape(*a.shape[:-2], *stack.shape[1:]) for stack in stacks)

        # The singular values are in ascending order.
        return u[..., ::-1], s[..., ::-1], vt[..., ::-1, :]

    return Prepared(run, fetch)
