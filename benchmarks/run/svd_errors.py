"""The error of a truncated SVD against the optimum, computed in float64."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.preparation import use_all_threads

_MAX_CACHED_SPECTRA = 4
_cached_spectra = {}


def measure_svd_errors(
    a: np.ndarray, svd: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> dict[str, float]:
    """Return the errors of a truncated SVD; for a stack, of its worst matrix.

    Here a_k is the best approximation of rank k:

        excess error      ‖a − u s vt‖_F / ‖a − a_k‖_F − 1
        excess over norm  (‖a − u s vt‖_F − ‖a − a_k‖_F) / ‖a‖_F, to be used if the
                          optimum itself is rounding
        orthogonality     max |uᵀu − I|, |vvᵀ − I|
        energy            the captured fraction of ‖a‖_F²

    Args:
        a: Matrix [m, n] or stack [layers, m, n].
        svd: u, s and vt, with the batch axis of `a`.
    """
    m, n = a.shape[-2:]
    u, s, vt = (np.asarray(part, np.float64) for part in svd)
    stacks = (
        a.reshape(-1, m, n),
        u.reshape(-1, *u.shape[-2:]),
        s.reshape(-1, s.shape[-1]),
        vt.reshape(-1, *vt.shape[-2:]),
    )
    each = [_measure_one(*parts) for parts in zip(*stacks, strict=True)]

    worst = {kind: max(errors[kind] for errors in each) for kind in each[0]}
    return {**worst, "energy": min(errors["energy"] for errors in each)}


def _measure_one(a, u, s, vt):
    values = compute_singular_values(a)
    norm = np.linalg.norm(values)
    best = np.linalg.norm(values[len(s) :])

    with use_all_threads():
        a = np.asarray(a, np.float64)
        residual = np.linalg.norm(a - (u * s) @ vt)
        orthogonality = measure_orthogonality(u, vt)

    return {
        # Float64 resolves the optimum no better than 1e-13 of the norm.
        "excess error": (residual - best) / max(best, 1e-13 * norm),
        "excess over norm": (residual - best) / norm,
        "orthogonality": orthogonality,
        "energy": 1 - (residual / norm) ** 2,
    }


def measure_orthogonality(u: np.ndarray, vt: np.ndarray) -> float:
    """Return the largest entry of |uᵀu − I| and |vvᵀ − I|."""
    identity = np.eye(len(vt))
    return max(np.abs(u.T @ u - identity).max(), np.abs(vt @ vt.T - identity).max())


def compute_singular_values(a: np.ndarray) -> np.ndarray:
    """Return all singular values in float64, in descending order.

    They are square roots of the eigenvalues of the smaller Gram matrix, which have an
    error of 1e-16 of the largest one. This is enough for a tail above 1e-6 of the norm,
    and float32 results resolve no smaller tail. The values of the last few matrices are
    cached.
    """
    # All bytes: a sample at a fixed distance may see only the low ones of each number,
    # which are zero in all differences of bfloat16 weights.
    key = (a.shape, a.dtype.str, hashlib.blake2b(a.tobytes()).digest())
    if key not in _cached_spectra:
        while len(_cached_spectra) >= _MAX_CACHED_SPECTRA:
            del _cached_spectra[next(iter(_cached_spectra))]
        _cached_spectra[key] = _compute_singular_values(np.asarray(a, np.float64))
    return _cached_spectra[key]


def _compute_singular_values(a):
    a = a if a.shape[0] <= a.shape[1] else a.T
    if jax.default_backend() == "cpu":
        with use_all_threads():
            squares = np.linalg.eigvalsh(a @ a.T)
    else:
        with jax.enable_x64(True):
            a = jnp.asarray(a)
            gram = jnp.matmul(a, a.T, precision="highest")
            squares = np.asarray(jnp.linalg.eigvalsh(gram))
    return np.sqrt(np.maximum(squares[::-1], 0))
