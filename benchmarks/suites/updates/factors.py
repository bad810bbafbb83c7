"""Random factors, the least work on them, and errors of products never formed."""

import zlib

import numpy as np

SUITE = "updates"


def make_factors(case, rank, seed=0):
    """Return float32 (u [m, rank], v [rank, n]) of random factors.

    The singular values of u @ v are near 1, 1/2, 1/3, ... An orthogonal matrix between
    both sides mixes their columns, as training does: they are not already an SVD.
    """
    m, n = case.shape
    rng = np.random.default_rng(zlib.crc32(f"{m} {n} {rank} {seed}".encode()))
    mix = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    u = rng.standard_normal((m, rank)) / np.sqrt(m)
    v = rng.standard_normal((rank, n)) / np.sqrt(n) / np.arange(1, rank + 1)[:, None]
    return (u @ mix).astype(np.float32), (mix.T @ v).astype(np.float32)


def count_least_work(shape, source_rank, rank):
    """Return the flops and bytes of half of each Gram matrix and two thin products."""
    total = sum(shape)
    return {
        "flops": 1.0 * total * source_rank * (source_rank + 2 * rank),
        "bytes": 4.0 * total * (source_rank + rank),
    }


def measure_distance(factors, others):
    """Return the Frobenius norm of the difference of two products, neither formed."""
    (u, v), (other_u, other_v) = factors, others
    stacked_u = np.concatenate([u, other_u], 1)
    stacked_v = np.concatenate([v, -other_v], 0)
    return np.linalg.norm(compute_core(stacked_u, stacked_v))


def compute_core(u, v):
    """Return the small float64 matrix that has the singular values of u @ v."""
    r_u, r_v = (
        np.linalg.qr(np.asarray(side, np.float64), mode="r")
        for side in (u, np.transpose(v))
    )
    return r_u @ r_v.T
