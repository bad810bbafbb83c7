"""How good a truncated SVD is: against the optimum, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.preparation import use_all_threads

_SPECTRA_KEPT = 4
_kept_spectra = {}


def measure_svd_errors(a, svd):
    """Return what is judged of an SVD (NumPy u, s, vt) of a matrix or a stack of matrices.

    excess error: ‖a − u s vt‖_F / ‖a − a_k‖_F − 1, of the worst matrix.
    excess over norm: (‖a − u s vt‖_F − ‖a − a_k‖_F) / ‖a‖_F, where the optimum itself is rounding.
    orthogonality: max |uᵀu − I|, |vvᵀ − I|.
    energy: the least part of ‖a‖_F² captured.
    """
    u, s, vt = (np.asarray(part, np.float64) for part in svd)
    m, n = a.shape[-2:]
    each = [
        _measure_one(*parts)
        for parts in zip(
            a.reshape(-1, m, n),
            u.reshape(-1, *u.shape[-2:]),
            s.reshape(-1, s.shape[-1]),
            vt.reshape(-1, *vt.shape[-2:]),
            strict=True,
        )
    ]
    worst = {kind: max(errors[kind] for errors in each) for kind in each[0]}
    return {**worst, "energy": min(errors["energy"] for errors in each)}


def _measure_one(a, u, s, vt):
    rank = len(s)
    values = compute_singular_values(a)
    with use_all_threads():
        a = np.asarray(a, np.float64)
        residual = np.linalg.norm(a - (u * s) @ vt)
        orthogonality = measure_orthogonality(u, vt)
    norm = np.linalg.norm(values)
    best = np.linalg.norm(values[rank:])
    return {
        # Float64 itself resolves the optimum no better than this.
        "excess error": (residual - best) / max(best, 1e-13 * norm),
        "excess over norm": (residual - best) / norm,
        "orthogonality": orthogonality,
        "energy": 1 - (residual / norm) ** 2,
    }


def measure_orthogonality(u, vt):
    """Return the largest of |uᵀu − I| and |vvᵀ − I|."""
    identity = np.eye(len(vt))
    return max(np.abs(u.T @ u - identity).max(), np.abs(vt @ vt.T - identity).max())


def compute_singular_values(a):
    """Return all singular values in float64, from the Gram matrix of the small side.

    Their squares err by 1e-16 of the largest: enough for a tail of more than 1e-6 of the norm,
    which is where float32 results end.
    """
    key = (a.shape, a.dtype.str, a.tobytes()[:: max(1, a.nbytes // 4096)])
    if key not in _kept_spectra:
        while len(_kept_spectra) >= _SPECTRA_KEPT:
            del _kept_spectra[next(iter(_kept_spectra))]
        _kept_spectra[key] = _compute_singular_values(np.asarray(a, np.float64))
    return _kept_spectra[key]


def _compute_singular_values(a):
    a = a if a.shape[0] <= a.shape[1] else a.T
    if jax.default_backend() == "cpu":
        with use_all_threads():
            squares = np.linalg.eigvalsh(a @ a.T)
    else:
        with jax.enable_x64(True):
            a = jnp.asarray(a)
            squares = np.asarray(
                jnp.linalg.eigvalsh(jnp.matmul(a, a.T, precision="highest"))
            )
    return np.sqrt(np.maximum(squares[::-1], 0))
